"""A head that is stored beside a config that ties it: what the engine that runs the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify
from families.sources import make, save, save_variant
from families.text import SIZES

TOWER = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
    "intermediate_size": 256, "image_size": 28, "vocab_size": 64,
}  # fmt: skip


def ovis2(folder: Path, *, whole: bool, text: bool) -> Path:
    """A family that vLLM 0.32 has no class for, with a head of its own on disk."""
    language = {"model_type": "qwen2", **SIZES, "tie_word_embeddings": text}
    config = transformers.AutoConfig.for_model(
        "ovis2", text_config=language, vision_config=TOWER, image_token_id=500,
        hidden_size=SIZES["hidden_size"], vocab_size=SIZES["vocab_size"],
        visual_indicator_token_ids=[501, 502, 503, 504, 505], tie_word_embeddings=whole,
    )  # fmt: skip
    make(config, "ImageTextToText").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if "lm_head.weight" not in tensors:
        embedding = tensors["model.language_model.embed_tokens.weight"]
        tensors["lm_head.weight"] = torch.randn_like(embedding)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantized(source: Path) -> Path:
    out = source.parent / f"{source.name}-quantized"
    return quantize(QuantizeRequest(model=source, recipe=load_scheme("fp8-dynamic"), out=out)).out


@pytest.mark.parametrize("engine", [None, "transformers"])
@pytest.mark.parametrize(("whole", "text"), [(False, True), (False, False), (True, False)])
def test_transformers_ties_by_the_whole_models_config(
    tmp_path: Path, whole: bool, text: bool, engine: str | None
) -> None:
    """It keeps the stored head in any case, and advises against a config that says otherwise."""
    out = quantized(ovis2(tmp_path / "ovis2", whole=whole, text=text))
    model = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.bfloat16)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert not torch.equal(head.weight, embedding.weight)
    with torch.device("meta"):
        built = type(model)(model.config)
    assert ("lm_head.weight" in built.all_tied_weights_keys) == whole
    found = {finding.code for finding in verify(out, engine=engine).findings}
    assert found == ({"tied-head"} if whole else set())


def test_vllm_ties_by_the_language_models(tmp_path: Path) -> None:
    source = save("llava", tmp_path)
    out = quantized(source)
    assert verify(out).findings == ()
    config = {"tie_word_embeddings": False}
    text = transformers.AutoConfig.from_pretrained(out).text_config.to_dict()
    changed = {**config, "text_config": text | {"tie_word_embeddings": True}}
    other = save_variant(out, tmp_path / "other", dict, changed)
    assert "tied-head" in {finding.code for finding in verify(other).findings}
