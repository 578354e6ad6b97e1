"""What the quantize kernels share: a scale from a maximum, a code from a value and its scale.

Scales are rounded to the source's dtype as llm-compressor does, so both helpers take that dtype.
Every value is finite; the reader refuses others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.rounding import (
    INTERPRETED,
    divide_16bit,
    e4m3_code,
    has_native_e4m3,
    lift_and_reciprocal,
    narrow,
    widen,
)

NARROW = (torch.bfloat16, torch.float16)


def code_switches(
    x: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[bool, bool, bool]:
    """CODES of the kernels: FP8 or INT8, values and scales of 16 bits, a cast to FP8 there."""
    narrow_both = x.dtype in NARROW and scale_dtype in NARROW
    return dtype == torch.float8_e4m3fn, narrow_both, has_native_e4m3(x.device)


def empty_codes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for codes as the kernels write them: uint8 for FP8 (a view makes it FP8), or int8."""
    plain = torch.uint8 if dtype == torch.float8_e4m3fn else torch.int8
    return torch.empty(shape, dtype=plain, device=device)


@triton.jit
def _absmax_bf16x2(a, b):
    """The larger absolute value of two bf16 tensors, the first without signs, as bits."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 q; and.b32 q, $2, 0x7FFF7FFF; max.bf16x2 $0, $1, q;}",
        "=r,r,r",
        [a, b.to(tl.int16, bitcast=True)],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _extreme_bf16x2(a, b, OP: tl.constexpr):
    """The smaller or the larger of bf16 tensors, as bits. OP is min or max."""
    return tl.inline_asm_elementwise(
        OP + ".bf16x2 $0, $1, $2;",
        "=r,r,r",
        [a, b.to(tl.int16, bitcast=True)],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def absmax_of(slices):
    """Elementwise maximum of the absolute values of a tuple of tensors, in fp32."""
    if slices[0].dtype == tl.bfloat16 and not INTERPRETED:
        # two values an instruction: maxima run at half the rate of additions
        bits = tl.zeros(slices[0].shape, tl.int16)
        for i in tl.static_range(len(slices)):
            bits = _absmax_bf16x2(bits, slices[i])
        return bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
    else:
        amax = tl.abs(widen(slices[0]))
        for i in tl.static_range(1, len(slices)):
            amax = tl.maximum(amax, tl.abs(widen(slices[i])))
        return amax


@triton.jit
def extrema_of(slices):
    """Elementwise minimum and maximum of a tuple of tensors, in fp32."""
    if slices[0].dtype == tl.bfloat16 and not INTERPRETED:
        low = slices[0].to(tl.int16, bitcast=True)
        high = low
        for i in tl.static_range(1, len(slices)):
            low = _extreme_bf16x2(low, slices[i], "min")
            high = _extreme_bf16x2(high, slices[i], "max")
        low = low.to(tl.bfloat16, bitcast=True).to(tl.float32)
        high = high.to(tl.bfloat16, bitcast=True).to(tl.float32)
    else:
        low, high = widen(slices[0]), widen(slices[0])
        for i in tl.static_range(1, len(slices)):
            low, high = tl.minimum(low, widen(slices[i])), tl.maximum(high, widen(slices[i]))
    return low, high


@triton.jit
def or_eps(scale, dtype: tl.constexpr):
    """A scale that came out as zero becomes its dtype's eps: zeros divide by it to zeros."""
    if dtype == tl.bfloat16:
        return tl.where(scale == 0.0, 0.0078125, scale)
    elif dtype == tl.float16:
        return tl.where(scale == 0.0, 0.0009765625, scale)
    else:
        return tl.where(scale == 0.0, 1.1920928955078125e-07, scale)


@triton.jit
def over(x, DIVISOR: tl.constexpr, dtype: tl.constexpr):
    """x / DIVISOR rounded to `dtype`, x a value of `dtype`; both fp32.

    By 15 and its halves a product with the reciprocal does, except in fp32: fifteen times a
    midpoint between two results has more bits than x can have, so there are no ties to miss.
    """
    if DIVISOR * 2 % 15 == 0 and dtype != tl.float32:
        quotient = x * (1.0 / DIVISOR)
    else:
        quotient = tl.math.div_rn(x, DIVISOR)
    return widen(narrow(quotient, dtype))


@triton.jit
def scale_of(amax, HALF_RANGE: tl.constexpr, dtype: tl.constexpr):
    """fp32 maxima -> scales rounded to `dtype`, still fp32."""
    return or_eps(over(amax, HALF_RANGE, dtype), dtype)


@triton.jit
def ratio(x, scale, NARROW: tl.constexpr):
    """x / scale in fp32, near enough to round to E4M3 correctly. `scale` broadcasts to x."""
    if NARROW:
        lift, reciprocal = lift_and_reciprocal(scale)
        return divide_16bit(x, lift, reciprocal)
    else:
        return tl.math.div_rn(x, scale)


@triton.jit
def integer_bits(
    x,
    scale,
    zero,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    NARROW: tl.constexpr,
):
    """0x4B400000 + OFFSET + the integer in [LOW, HIGH] nearest to x / scale + zero, ties to even.

    These are the bits of a float, from which a caller takes the low byte or a sum of shifted
    nibbles: integer instructions are what packing is short of, and this needs the clamp's two.
    """
    if NARROW:
        # Adding 768 to a product with the reciprocal rounds it to a multiple of 2^-14. It is within
        # 2^-15 of the quotient, so a tie becomes one again; what is no tie is 2^-13 away from any.
        lift, reciprocal = lift_and_reciprocal(scale)
        shifted = tl.fma(x * lift, reciprocal, 768.0 + zero)
        whole = tl.clamp(shifted, 768.0 + LOW, 768.0 + HIGH) + (12582144.0 + OFFSET)
    else:
        quotient = tl.math.div_rn(x, scale) + zero
        whole = tl.clamp(quotient, 0.0 + LOW, 0.0 + HIGH) + (12582912.0 + OFFSET)
    return whole.to(tl.int32, bitcast=True)


@triton.jit
def scale_of_codes(amax, CODES: tl.constexpr, dtype: tl.constexpr):
    """`scale_of` for FP8 or INT8."""
    return scale_of(amax, 448.0 if CODES[0] else 127.5, dtype)


@triton.jit
def code(x, scale, CODES: tl.constexpr):
    """The FP8 (uint8) or INT8 code nearest to x / scale, both fp32, ties to even, saturating."""
    if CODES[0]:
        return e4m3_code(ratio(x, scale, CODES[1]), CODES[2])
    else:
        return integer_bits(x, scale, 0.0, -128, 127, 0, CODES[1]).to(tl.int8)
