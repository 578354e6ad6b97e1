"""Every family in every format equals llm-compressor's own, or the difference has its reason.

Scales, zero points, packing and names bit for bit; codes are those of llm-compressor's arithmetic
on a GPU, which divides in float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from matrix_cells import FORMATS, Cell, as_a_user_gets_it, as_it_should_be, convert, weights_only
from matrix_models import FAMILIES
from tiny.tensors import differences, tensors_in

LLAMA4 = ("llama4 dense", "llama4 moe")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where ckptq does not write what `model_free_ptq` writes, and which of the two is right."""

    families: tuple[str, ...]
    formats: tuple[str, ...]
    tensors: str
    why: str


DIFFERENCES = (
    Difference(
        families=("llama4 moe",),
        formats=FORMATS,
        tensors=r".*\.experts\.\d+\.(gate|up|down)_proj\.",
        why="model_free_ptq cuts [E, H, 2I] as [E, 2I, H] and does not transpose [E, I, H]. "
        "ckptq is right: so do transformers' Llama4TextExperts and llm-compressor's oneshot",
    ),
    Difference(
        families=LLAMA4,
        formats=("fp8-block", "w4a16-asym"),
        tensors=r".*\.self_attn\.[qkv]_proj\.",
        why="vLLM permutes q/k rows and cannot move block scales or packed zero points. ckptq is "
        "right in vLLM: per channel, or symmetric; --as-written gives llm-compressor's",
    ),
    Difference(
        families=tuple(FAMILIES),
        formats=("fp8-static",),
        tensors=r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj|w1|w3)\.weight(_scale)?$",
        why="vLLM requantizes q/k/v and gate/up to the largest of their scales. ckptq is right: "
        "with one scale from the start, nothing is rounded twice",
    ),
    Difference(
        families=("qwen3-moe", *LLAMA4),
        formats=("nvfp4a16", "nvfp4"),
        tensors=r".*\.(gate_proj|up_proj)\.",
        why="model_free_ptq lets gate and up share a global scale under the names mlp.gate_proj "
        "and w1 only. ckptq is right: vLLM takes one for both",
    ),
)

SEARCHED = ("fp8-dynamic", "fp8-block", "w8a8", "w4a16-g32", "w4a16-asym", "mxfp4a16")

CELLS = [
    *((family, format) for family in FAMILIES for format in FORMATS),
    *(("mixtral", f"{format}-search") for format in SEARCHED),
    ("llama", "nvfp4a16-search"),  # a search of 24 s where there are experts
]


def reasons(family: str, format: str) -> list[Difference]:
    return [d for d in DIFFERENCES if family in d.families and format in d.formats]


@pytest.mark.parametrize(("family", "format"), CELLS)
def test_equals_model_free_ptq_or_says_why(cell: Cell, family: str, format: str) -> None:
    source, out = cell(family, format)
    different = differences(weights_only(tensors_in(out)), as_a_user_gets_it(source, format))
    for reason in reasons(family, format):
        explained = [name for name in different if re.match(reason.tensors, name)]
        assert explained, f"no longer true: {reason.why}"
    patterns = [reason.tensors for reason in reasons(family, format)]
    assert [n for n in different if not any(re.match(p, n) for p in patterns)] == []


@pytest.mark.parametrize(("family", "format"), CELLS)
def test_every_linear_equals_llm_compressors(cell: Cell, family: str, format: str) -> None:
    """No exception: each Linear, in the scheme that config.json declares for it."""
    source, out = cell(family, format)
    assert differences(weights_only(tensors_in(out)), as_it_should_be(source, out)) == []


@pytest.mark.parametrize("format", ["fp8-block", "w4a16-asym"])
def test_as_written_is_llm_compressors(cell: Cell, tmp_path, format: str) -> None:
    source, _ = cell("llama4 dense", format)
    out = convert(source, tmp_path / "out", format, permutable=False)
    assert differences(tensors_in(out), as_a_user_gets_it(source, format)) == []


def test_one_scale_loses_less_than_requantizing(cell: Cell) -> None:
    """What vLLM makes of separate scales is further from the source than one scale is."""
    source, out = cell("llama", "fp8-static")
    weights, ours = tensors_in(source), tensors_in(out)
    theirs = as_a_user_gets_it(source, "fp8-static")
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    largest = max(theirs[f"{name}_scale"] for name in names).float()
    errors: dict[str, float] = {"ours": 0.0, "requantized": 0.0}
    for name in names:
        loaded = theirs[name].float() * theirs[f"{name}_scale"].float()
        requantized = (loaded / largest).clamp(-448, 448).to(torch.float8_e4m3fn).float() * largest
        errors["requantized"] += float((requantized - weights[name].float()).square().sum())
        once = ours[name].float() * ours[f"{name}_scale"].float()
        errors["ours"] += float((once - weights[name].float()).square().sum())
    assert errors["ours"] < errors["requantized"]


def test_a_changed_bit_is_noticed(cell: Cell) -> None:
    """The comparison must be able to fail, in the tensor that was changed."""
    source, out = cell("mixtral", "w4a16-g32")
    ours = tensors_in(out)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed"
    ours[name][5, 7] ^= 1
    assert differences(ours, as_it_should_be(source, out)) == [name]
