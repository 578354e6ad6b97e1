"""The ends of each dtype, and values that are no numbers."""

import pytest
import reference_int4 as int4_meaning
import reference_quantize as meaning
import torch
from kernel_cases import both_same, same, weights

from ckptq.kernels.int4.quantize_int4 import quantize_int4
from ckptq.kernels.quantize.quantize_rows import quantize_rows
from ckptq.kernels.quantize.quantize_static import quantize_static

FP8, INT8 = torch.float8_e4m3fn, torch.int8
CODES = pytest.mark.parametrize("codes", [FP8, INT8], ids=["fp8", "int8"])
LARGEST = torch.finfo(torch.float32).max


def every_size() -> torch.Tensor:
    """fp32 rows of 32 values alike in size, from the smallest subnormal, 2^-149, to 2^126."""
    row = torch.randn(276, 32, generator=torch.Generator().manual_seed(4))
    return torch.ldexp(row, torch.arange(-149, 127)[:, None])


@CODES
def test_fp32_of_every_size(device: torch.device, codes: torch.dtype) -> None:
    """Nothing is flushed: subnormal scales of subnormal rows, then eps where they vanish."""
    x = every_size()
    want = meaning.quantize_rows(x, codes)
    assert both_same(quantize_rows(x.to(device), codes), want)
    smallest = torch.finfo(torch.float32).tiny
    assert ((want[1] > 0) & (want[1] < smallest)).any()
    assert (want[1] == torch.finfo(torch.float32).eps).any()
    assert ((want[1] < smallest) & (want[0].float().abs().amax(1, keepdim=True) > 100)).any()


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_int4_of_every_size(device: torch.device, symmetric: bool) -> None:
    x = every_size()
    want = int4_meaning.quantize_int4(x, 32, symmetric)
    got = quantize_int4(x.to(device), 32, symmetric)
    assert all(same(g, w) for g, w in zip(got, want, strict=True) if w is not None)


@CODES
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_infinities_saturate_and_spoil_nothing_beside_them(
    device: torch.device, source: torch.dtype, codes: torch.dtype
) -> None:
    """Under static scales, where a source is not asked for a maximum. NaN gets some code."""
    x = weights((4, 64), source)
    spoilt = x.clone()
    spoilt[1, 3], spoilt[2, 5], spoilt[3, 7] = torch.inf, -torch.inf, torch.nan
    scale = torch.full((1, 1), 0.0123, dtype=source)
    want = meaning.quantize_static(x, scale, (4, 64), codes)
    got = quantize_static(spoilt.to(device), scale.to(device), (4, 64), codes).cpu()
    ends = [448.0, -448.0] if codes == FP8 else [127.0, -128.0]
    assert [got[1, 3].float().item(), got[2, 5].float().item()] == ends
    beside = x.isfinite() & spoilt.isfinite()
    assert torch.equal(got.view(torch.uint8)[beside], want.view(torch.uint8)[beside])
