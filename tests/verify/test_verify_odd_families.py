"""Families whose layers, embeddings or initialization are not a Llama's: right where transformers
runs them, named where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.models import causal

from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_recipe, load_scheme
from ckptq.verify.report import Report
from ckptq.verify.run import verify

SIZES: dict[str, dict[str, Any]] = {
    "Mamba2": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32,
        "state_size": 16, "n_groups": 1, "vocab_size": 64,
    },
    "OPT": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
        "vocab_size": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
    },
    "Llama": {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 64,
    },
}  # fmt: skip


def source(folder: Path, family: str, **changes: Any) -> Path:
    torch.manual_seed(1)
    causal(family, SIZES[family], **changes).bfloat16().save_pretrained(folder / "source")
    return folder / "source"


def verified(path: Path, scheme: str, **options: Any) -> Report:
    out = path.parent / "out"
    quantize(QuantizeRequest(model=path, recipe=load_scheme(scheme), out=out))
    return verify(out, path, **options)


def codes(report: Report) -> list[str]:
    return [one.code for one in report.findings]


def test_layers_without_a_cache_are_found_with_headers_only_too(tmp_path: Path) -> None:
    assert codes(verified(source(tmp_path, "Mamba2"), "fp8-dynamic", headers_only=True)) == []
    assert codes(verify(tmp_path / "out", headers_only=True)) == []


def test_packed_weights_that_initialization_asks_for_are_named(tmp_path: Path) -> None:
    path = source(tmp_path, "Mamba2")
    options = {"engine": "transformers", "headers_only": True}
    found = verified(path, "w4a16-g32", **options).findings
    assert [(one.code, one.tensor) for one in found] == [
        ("engine-refuses", "backbone.layers.*.mixer.out_proj")
    ]


@pytest.mark.parametrize("scheme", ["w8a8", "fp8-dynamic"])
def test_what_is_not_packed_loads(tmp_path: Path, scheme: str) -> None:
    assert codes(verified(source(tmp_path, "Mamba2"), scheme, engine="transformers")) == []


def test_an_embedding_narrower_than_the_layers(tmp_path: Path) -> None:
    assert codes(verified(source(tmp_path, "OPT"), "fp8-dynamic")) == []


def test_an_embedding_of_another_width_is_still_named(tmp_path: Path) -> None:
    path = source(tmp_path, "OPT")
    config = path / "config.json"
    config.write_text(config.read_text().replace('dim": 32', 'dim": 48'))
    assert "config-shapes" in codes(verify(path, headers_only=True))


def test_leftovers_of_another_layer_are_not_asked_for_their_siblings(tmp_path: Path) -> None:
    path = source(tmp_path, "Llama")
    file = path / "model.safetensors"
    tensors = load_file(file)
    extra = tensors["model.layers.0.self_attn.q_proj.weight"].clone()
    save_file({**tensors, "model.layers.7.self_attn.q_proj.weight": extra}, file, {"format": "pt"})
    assert codes(verified(path, "fp8-dynamic")) == []


def test_an_embedding_that_a_target_means_is_ignored(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "default_stage:\n  default_modifiers:\n    QuantizationModifier:\n"
        '      targets: ["Linear", "re:.*embed_tokens"]\n      scheme: FP8_DYNAMIC\n'
    )
    path, out = source(tmp_path, "Llama"), tmp_path / "out"
    quantize(QuantizeRequest(model=path, recipe=load_recipe(recipe), out=out))
    assert codes(verify(out, path, engine="transformers")) == []
