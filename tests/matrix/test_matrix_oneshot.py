"""The cells that only a run of the model can judge: experts as transformers cuts them, and
activation scales. llm-compressor's `oneshot` is the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix_cells import Cell, Tensors, division_in_float32, weights_only
from matrix_oneshot import oneshot_folder
from tiny.tensors import differences, tensors_in


def oneshot_tensors(source: Path, format: str, out: Path) -> Tensors:
    with division_in_float32():
        return tensors_in(oneshot_folder(source, format, out))


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
