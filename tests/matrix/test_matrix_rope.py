"""`quantize --rope-order half-split` writes what `permute` makes of the kept order, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matrix_cells import FORMATS, Cell, convert
from tiny.tensors import differences, tensors_in
from transformers import Llama4ForCausalLM, Llama4TextConfig

from ckptq.convert.permute import PermuteRequest, permute
from ckptq.errors import UsageError
from ckptq.rope_order import RopeOrder
from ckptq.verify.run import verify

WEIGHTS = "model.safetensors"


def permuted(folder: Path, out: Path, to: RopeOrder) -> Path:
    permute(PermuteRequest(model=folder, out=out, to=to))
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_half_split_is_the_permuted_one(cell: Cell, tmp_path: Path, format: str) -> None:
    source, kept = cell("llama4 moe", format)
    at_once = convert(source, tmp_path / "at-once", format, rope_order="half-split")
    in_two = permuted(kept, tmp_path / "in-two", RopeOrder.HALF_SPLIT)
    assert (at_once / WEIGHTS).read_bytes() == (in_two / WEIGHTS).read_bytes()
    assert (at_once / "config.json").read_text() == (in_two / "config.json").read_text()
    assert verify(at_once, source).findings == ()


def test_it_moves_q_and_k_and_nothing_else(cell: Cell, tmp_path: Path) -> None:
    """The equality above is between moved tensors, not between two copies."""
    _, kept = cell("llama4 dense", "w8a8")
    moved = permuted(kept, tmp_path / "moved", RopeOrder.HALF_SPLIT)
    layers = [f"language_model.model.layers.{i}.self_attn" for i in range(2)]
    want = [
        f"{x}.{p}.{t}"
        for x in layers
        for p in ("k_proj", "q_proj")
        for t in ("weight", "weight_scale")
    ]
    assert differences(tensors_in(kept), tensors_in(moved)) == want


@pytest.mark.parametrize("format", ["fp8-dynamic", "w4a16-asym", "nvfp4a16"])
def test_back_again_is_where_it_began(cell: Cell, tmp_path: Path, format: str) -> None:
    _, kept = cell("llama4 dense", format)
    there = permuted(kept, tmp_path / "there", RopeOrder.HALF_SPLIT)
    back = permuted(there, tmp_path / "back", RopeOrder.INTERLEAVED)
    assert differences(tensors_in(kept), tensors_in(back)) == []


def test_a_permuted_source_is_not_permuted_again(cell: Cell, tmp_path: Path) -> None:
    source, _ = cell("llama4 dense", "w8a8")
    there = permuted(source, tmp_path / "there", RopeOrder.HALF_SPLIT)
    with pytest.raises(UsageError, match="half-split"):
        convert(there, tmp_path / "twice", "w8a8", rope_order="half-split")


def test_a_source_that_is_dequantized_moves_alike(cell: Cell, tmp_path: Path) -> None:
    _, fp8 = cell("llama4 dense", "fp8-dynamic")
    kept = convert(fp8, tmp_path / "kept", "w4a16-asym")
    at_once = convert(fp8, tmp_path / "at-once", "w4a16-asym", rope_order="half-split")
    in_two = permuted(kept, tmp_path / "in-two", RopeOrder.HALF_SPLIT)
    assert (at_once / WEIGHTS).read_bytes() == (in_two / WEIGHTS).read_bytes()
    assert (at_once / WEIGHTS).read_bytes() != (kept / WEIGHTS).read_bytes()


def test_biases_of_q_and_k_move_too(tmp_path: Path) -> None:
    """Vectors go the way of the rows that they belong to, whichever command moves them."""
    torch.manual_seed(0)
    source = tmp_path / "source"
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        moe_layers=[], attention_bias=True,
    )  # fmt: skip
    model = Llama4ForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(source)
    kept = convert(source, tmp_path / "kept", "w8a8")
    at_once = convert(source, tmp_path / "at-once", "w8a8", rope_order="half-split")
    in_two = permuted(kept, tmp_path / "in-two", RopeOrder.HALF_SPLIT)
    assert (at_once / WEIGHTS).read_bytes() == (in_two / WEIGHTS).read_bytes()
    attention = "model.layers.0.self_attn"
    moved = differences(tensors_in(kept), tensors_in(at_once))
    assert {f"{attention}.{p}.bias" for p in ("q_proj", "k_proj")} <= set(moved)
    assert f"{attention}.v_proj.bias" not in moved
