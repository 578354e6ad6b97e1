"""Fused experts: the transpose folded into the addresses, equal to transposing first."""

import pytest
import torch
from kernel_cases import both_same, same, weights

from ckptq.kernels.int4 import reference as int4_meaning
from ckptq.kernels.int4.quantize_int4_experts import quantize_int4_experts
from ckptq.kernels.quantize import reference as meaning
from ckptq.kernels.quantize.quantize_expert_blocks import quantize_expert_blocks
from ckptq.kernels.quantize.quantize_experts import quantize_experts

FP8, INT8 = torch.float8_e4m3fn, torch.int8
CODES = pytest.mark.parametrize("codes", [FP8, INT8], ids=["fp8", "int8"])
SOURCES = pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@CODES
@SOURCES
@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 152, 140), (2, 64, 260), (1, 320, 24)], ids=str)
def test_rows_of_the_transpose(
    device: torch.device,
    shape: tuple[int, int, int],
    source: torch.dtype,
    codes: torch.dtype,
) -> None:
    x = weights(shape, source)
    got = quantize_experts(x.to(device), codes)
    assert both_same(got, meaning.quantize_experts(x, codes))


@CODES
def test_gate_and_up_are_slices_of_the_fused_tensor(
    device: torch.device, codes: torch.dtype
) -> None:
    """And the slice matters: gate read in place of up is noticed."""
    x = weights((2, 40, 2 * 70))
    gate, up = (
        quantize_experts(half, codes) for half in (x.to(device)[:, :, :70], x.to(device)[:, :, 70:])
    )
    assert both_same(gate, meaning.quantize_experts(x[:, :, :70], codes))
    assert both_same(up, meaning.quantize_experts(x[:, :, 70:], codes))
    assert not same(gate[0], up[0].cpu())


def test_the_untransposed_cut_is_noticed(device: torch.device) -> None:
    """K == N, where reading the wrong axis fits every shape."""
    x = weights((2, 64, 64))
    got = quantize_experts(x.to(device))
    assert both_same(got, meaning.quantize_experts(x))
    wrong = meaning.quantize_experts(x.transpose(1, 2))
    assert not same(got[0], wrong[0])
    assert not same(got[1], wrong[1])


@CODES
@SOURCES
@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 152, 140), (2, 64, 260)], ids=str)
def test_blocks_of_the_transpose(
    device: torch.device, shape: tuple[int, int, int], source: torch.dtype, codes: torch.dtype
) -> None:
    x = weights(shape, source)
    got = quantize_expert_blocks(x.to(device), codes)
    assert both_same(got, meaning.quantize_expert_blocks(x, codes))


def test_blocks_of_another_size(device: torch.device) -> None:
    x = weights((2, 100, 70))
    got = quantize_expert_blocks(x.to(device), FP8, 32)
    assert both_same(got, meaning.quantize_expert_blocks(x, FP8, 32))
    assert got[1].shape == (2, 3, 4)


@SOURCES
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("shape", "group"), [((2, 96, 70), 32), ((1, 64, 3), 64), ((2, 384, 67), 128)], ids=str
)
def test_int4_groups_of_the_transpose(
    device: torch.device,
    shape: tuple[int, int, int],
    group: int,
    symmetric: bool,
    source: torch.dtype,
) -> None:
    x = weights(shape, source)
    got = quantize_int4_experts(x.to(device), group, symmetric)
    want = int4_meaning.quantize_int4_experts(x, group, symmetric)
    assert (got[2] is None) == (want[2] is None) == symmetric
    assert all(same(g, w) for g, w in zip(got, want, strict=True) if w is not None)


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    x = weights((1, 96, 8)).to(device)
    with pytest.raises(ValueError, match="group 64 does not fit"):
        quantize_int4_experts(x, 64)
    for quantize in (quantize_experts, quantize_expert_blocks):
        with pytest.raises(ValueError, match="dense columns"):
            quantize(x.transpose(1, 2))
        with pytest.raises(ValueError, match="rows in fours"):
            quantize(x[:, :95])
    with pytest.raises(ValueError, match="power of two"):
        quantize_expert_blocks(x, FP8, 96)
