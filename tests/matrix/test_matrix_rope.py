"""`quantize --rope-order half-split` writes what `permute` makes of the kept order, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix_cells import FORMATS, Cell, convert
from tiny.tensors import differences, tensors_in

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import UsageError
from ckptq.permute.run import permute_checkpoint, plan_permute
from ckptq.rope_order import RopeOrder
from ckptq.verify.run import verify

WEIGHTS = "model.safetensors"


def permuted(folder: Path, out: Path, to: RopeOrder) -> Path:
    permute_checkpoint(plan_permute(open_checkpoint(folder), to), out)
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
