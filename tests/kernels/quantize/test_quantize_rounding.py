"""The rounding that all kernels share, against torch's cast and against a search of the table."""

import pytest
import torch
import triton
import triton.language as tl
from reference_quantize import E4M3, nearest_e4m3, nearest_int
from torch import Tensor

from ckptq.kernels.quantize.slices import ratio
from ckptq.kernels.rounding import (
    e4m3_code,
    e4m3_value,
    has_native_e4m3,
    narrow,
    round_half_even,
    widen,
)

E4M3FN = torch.float8_e4m3fn


@triton.jit
def _rounding_kernel(x_ptr, code_ptr, int_ptr, N, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    o_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_B = tl.load(x_ptr + o_B, mask=o_B < N, other=0.0)
    tl.store(code_ptr + o_B, e4m3_code(x_B, NATIVE), mask=o_B < N)
    tl.store(int_ptr + o_B, round_half_even(tl.clamp(x_B, -128.0, 127.0)), mask=o_B < N)


@triton.jit
def _value_kernel(code_ptr, value_ptr, NATIVE: tl.constexpr, N: tl.constexpr):
    o_N = tl.arange(0, N)
    tl.store(value_ptr + o_N, e4m3_value(tl.load(code_ptr + o_N), NATIVE))


@triton.jit
def _ratio_kernel(x_ptr, scale_ptr, out_ptr, N, NARROW: tl.constexpr, BLOCK: tl.constexpr):
    o_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_B = widen(tl.load(x_ptr + o_B, mask=o_B < N, other=0.0))
    scale_B = widen(tl.load(scale_ptr + o_B, mask=o_B < N, other=1.0))
    tl.store(out_ptr + o_B, ratio(x_B, scale_B, NARROW), mask=o_B < N)


@triton.jit
def _narrow_kernel(x_ptr, wide_ptr, narrow_ptr, N, BLOCK: tl.constexpr):
    o_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_B = tl.load(x_ptr + o_B, mask=o_B < N, other=0.0)
    narrow_B = narrow(x_B, narrow_ptr.dtype.element_ty)
    tl.store(narrow_ptr + o_B, narrow_B, mask=o_B < N)
    tl.store(wide_ptr + o_B, widen(narrow_B), mask=o_B < N)


def every_bf16() -> Tensor:
    w = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return w[w.isfinite()]


def hard_values() -> Tensor:
    """Every bf16, every E4M3 value and midpoint and half integer, with their fp32 neighbours."""
    exact = torch.cat([E4M3, (E4M3[1:] + E4M3[:-1]) / 2, torch.arange(0, 130, 0.5)]).float()
    far = torch.tensor(torch.inf)
    near = torch.cat([exact, exact.nextafter(far), exact.nextafter(-far)])
    return torch.cat([every_bf16().float(), near, -near])


def rounded(x: Tensor, native: bool) -> tuple[Tensor, Tensor]:
    code = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    integer = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(x.numel(), 4096),)
    _rounding_kernel[grid](x, code, integer, x.numel(), native, 4096, enable_fp_fusion=False)
    return code.cpu(), integer.cpu()


@pytest.mark.parametrize("native", [False, True])
def test_codes_equal_the_search_and_torch(device: torch.device, native: bool) -> None:
    if native and not has_native_e4m3(device):
        pytest.skip("no cast to E4M3 here; its twin on the bits runs everywhere")
    x = hard_values()
    code, integer = rounded(x.to(device), native)
    assert torch.equal(code, nearest_e4m3(x).view(torch.uint8))
    assert torch.equal(code, x.clamp(-448, 448).to(E4M3FN).view(torch.uint8))
    assert torch.equal(integer.to(torch.int8), nearest_int(x, -128, 127))
    assert torch.equal(integer.float(), x.clamp(-128, 127).round())


def test_golden_codes(device: torch.device) -> None:
    # by hand: sign, exponent + 7, three bits. 17 and 2^-10 are ties; 0.013671875 is 7 * 2^-9
    x = torch.tensor([0.0, -0.0, 1.0, 17.0, 19.0, -448.0, 1e9, 2.0**-10, 0.013671875, 0.0146484375])
    code, _ = rounded(x.to(device), False)
    assert code.tolist() == [0x00, 0x80, 0x38, 0x58, 0x5A, 0xFE, 0x7E, 0x00, 0x07, 0x08]


@pytest.mark.parametrize("native", [False, True])
def test_values_are_those_of_torch_bit_for_bit(device: torch.device, native: bool) -> None:
    if native and not has_native_e4m3(device):
        pytest.skip("no cast from E4M3 here; its twin on the bits runs everywhere")
    code = torch.arange(256, dtype=torch.uint8)
    value = torch.empty(256, device=device)
    _value_kernel[(1,)](code.to(device), value, native, 256)
    finite = (code & 0x7F) != 0x7F
    want = code.view(E4M3FN).float()
    assert torch.equal(value.cpu().view(torch.int32)[finite], want.view(torch.int32)[finite])


def divided(x: Tensor, scale: Tensor, narrow: bool, device: torch.device) -> Tensor:
    out = torch.empty(x.shape, device=device)
    grid = (triton.cdiv(x.numel(), 65536),)
    args = (x.to(device), scale.to(device), out, x.numel(), narrow, 65536)
    _ratio_kernel[grid](*args, enable_fp_fusion=False)
    return out.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_short_division_gives_the_codes_of_the_exact_one(
    device: torch.device, dtype: torch.dtype
) -> None:
    """Pairs of mantissas at exponents where their ratio meets midpoints, plus extreme scales."""
    bits = 8 if dtype == torch.bfloat16 else 11
    mantissa = torch.arange(2 ** (bits - 1), 2**bits) / 2 ** (bits - 1)  # all of [1, 2)
    exponent = torch.arange(-8.0, 10.0, 2 if bits == 8 else 5)
    x, scale = torch.broadcast_tensors(
        (mantissa[:, None] * 2**exponent)[:, :, None], mantissa[:: 1 if bits == 8 else 61]
    )
    x, scale = x.flatten().to(dtype), scale.flatten().to(dtype)
    if dtype == torch.bfloat16:
        tiny, huge = torch.tensor([2.0**-133, 2.0**126], dtype=dtype)
        x = torch.cat([x, torch.stack([tiny * 5, tiny * 17, huge / 8, -huge / 3])])
        scale = torch.cat([scale, torch.stack([tiny, tiny, huge, huge])])
    short, exact = divided(x, scale, True, device), x.float() / scale.float()
    assert torch.equal(nearest_e4m3(short).view(torch.uint8), nearest_e4m3(exact).view(torch.uint8))
    assert torch.equal(nearest_int(short, -128, 127), nearest_int(exact, -128, 127))


def test_a_product_with_the_reciprocal_alone_would_be_noticed() -> None:
    """What the short division adds to x * (1 / scale) is needed: ties break without it."""
    x, scale = torch.arange(128.0, 256)[:, None], torch.arange(128.0, 256)
    product, exact = x * (1 / scale), x / scale
    codes = [nearest_e4m3(r * 64).view(torch.uint8) for r in (product, exact)]
    assert not torch.equal(*codes)


def test_the_long_division_is_ieee(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(2, 100_000, generator=generator)
    got = divided(x, scale.abs() + 0.01, False, device)
    assert torch.equal(got, x / (scale.abs() + 0.01))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_rounds_as_torch_and_widen_is_exact(
    device: torch.device, dtype: torch.dtype
) -> None:
    x = torch.cat([every_bf16().float(), every_bf16().float() * 1.00390625, hard_values() * 1.003])
    x = x[x.abs() < 6e4]
    got = torch.empty(x.shape, dtype=dtype, device=device)
    wide = torch.empty(x.shape, device=device)
    grid = (triton.cdiv(x.numel(), 65536),)
    _narrow_kernel[grid](x.to(device), wide, got, x.numel(), 65536)
    assert torch.equal(got.cpu(), x.to(dtype))
    assert torch.equal(wide.cpu(), x.to(dtype).float())
