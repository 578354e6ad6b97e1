"""The cells that only a run of the model can judge: experts as transformers cuts them, and
activation scales. llm-compressor's `oneshot` is the reference."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import transformers
from matrix_cells import (
    LENGTH,
    Cell,
    Tensors,
    differences,
    division_in_float32,
    tensors_in,
    token_rows,
    weights_only,
)

from ckptq.recipes.load import built_in

IGNORE = "ignore: ['re:.*lm_head', 're:.*router', 're:.*vision_model.*', 're:.*projector.*']"


def oneshot_tensors(source: Path, format: str, out: Path) -> Tensors:
    """What oneshot and save_pretrained write by the built-in recipe, on the same samples."""
    from llmcompressor import oneshot
    from llmcompressor.utils import helpers

    config = json.loads((source / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(source, dtype="auto")
    recipe = built_in()[format].read_text().replace("ignore: [lm_head]", IGNORE)
    with pytest.MonkeyPatch.context() as patch, division_in_float32():
        # 0.14.0.1 calibrates with eager attention, whose outputs differ from SDPA's in a last bit
        patch.setattr(helpers, "use_eager_attention", lambda model: nullcontext())
        oneshot(model=model, recipe=recipe, **(dataset() if format == "fp8-static" else {}))
        model.save_pretrained(out)
    return tensors_in(out)


def dataset() -> dict[str, object]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    rows = token_rows()
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1}, unk_token="<pad>"))
    return {
        "dataset": Dataset.from_dict(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        ),
        "max_seq_length": LENGTH,
        "num_calibration_samples": len(rows),
        "processor": transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"),
        "shuffle_calibration_samples": False,
    }


@pytest.mark.parametrize("format", ["fp8-dynamic", "w4a16-g32"])
def test_llama4_experts_are_oneshots(cell: Cell, tmp_path: Path, format: str) -> None:
    source, out = cell("llama4 moe", format)
    assert differences(tensors_in(out), oneshot_tensors(source, format, tmp_path / "oneshot")) == []


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activation_scales_are_oneshots(cell: Cell, tmp_path: Path, family: str) -> None:
    source, out = cell(family, "fp8-static")
    ours, theirs = tensors_in(out), oneshot_tensors(source, "fp8-static", tmp_path / "oneshot")
    assert ours.keys() == theirs.keys()
    inputs = [name for name in theirs if name.endswith(".input_scale")]
    assert len(inputs) == 14
    assert differences({n: ours[n] for n in inputs}, {n: theirs[n] for n in inputs}) == []
    assert weights_only(ours).keys() == weights_only(theirs).keys()


def test_experts_share_what_vllm_wants_equal(cell: Cell) -> None:
    """vLLM refuses w1 and w3 of an expert with different input scales."""
    for family in ("mixtral", "qwen3-moe", "llama4 moe"):
        ours = tensors_in(cell(family, "fp8-static")[1])
        for gate, up in (("w1", "w3"), ("gate_proj", "up_proj")):
            for name in [n for n in ours if n.endswith(f"{gate}.input_scale")]:
                assert ours[name] == ours[name.replace(gate, up)], name
