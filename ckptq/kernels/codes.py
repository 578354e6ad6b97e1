"""What the quantize kernels share: a scale from a maximum, a code from a value and its scale.

Scales are rounded to the source's dtype as llm-compressor does, so both helpers take that dtype.
Every value is finite; the reader refuses others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.rounding import (
    divide_16bit,
    e4m3_code,
    has_native_e4m3,
    lift_and_reciprocal,
    narrow,
    round_half_even,
    widen,
)

HALF_RANGE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.5}
"""By what the absolute maximum is divided."""

NARROW = (torch.bfloat16, torch.float16)


def code_constexprs(x: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype) -> dict[str, bool]:
    """The compile-time switches of `code`, as launchers pass them."""
    return {
        "FP8": dtype == torch.float8_e4m3fn,
        "NARROW": x.dtype in NARROW and scale_dtype in NARROW,
        "NATIVE": has_native_e4m3(x.device),
    }


def empty_codes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for codes as the kernels write them: uint8 for FP8 (a view makes it FP8), or int8."""
    plain = torch.uint8 if dtype == torch.float8_e4m3fn else torch.int8
    return torch.empty(shape, dtype=plain, device=device)


@triton.jit
def load_slices(ptrs, stride, mask, COUNT: tl.constexpr, EVICTION: tl.constexpr):
    """COUNT tensors, each `stride` elements after the one before, as a tuple.

    Not one tensor with an axis of COUNT: then the compiler would choose whether that axis lies in
    one thread, as it must where its elements are put together into a word (3.6 chose otherwise).
    """
    slices = (tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICTION),)
    for i in tl.static_range(1, COUNT):
        x = tl.load(ptrs + i * stride, mask=mask, other=0.0, eviction_policy=EVICTION)
        slices = slices + (x,)  # type: ignore[assignment]  # noqa: RUF005
    return slices


@triton.jit
def absmax_of(slices, COUNT: tl.constexpr):
    """Elementwise maximum of the absolute values of COUNT tensors, in fp32."""
    amax = tl.abs(widen(slices[0]))
    for i in tl.static_range(1, COUNT):
        amax = tl.maximum(amax, tl.abs(widen(slices[i])))
    return amax


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
def scale_of(amax, HALF_RANGE: tl.constexpr, dtype: tl.constexpr):
    """fp32 maxima -> scales rounded to `dtype`, still fp32."""
    scale = widen(narrow(tl.math.div_rn(amax, HALF_RANGE), dtype))
    return or_eps(scale, dtype)


@triton.jit
def ratio(x, scale, NARROW: tl.constexpr):
    """x / scale in fp32, near enough to be rounded to a code rightly. `scale` broadcasts to x."""
    if NARROW:
        lift, reciprocal = lift_and_reciprocal(scale)
        return divide_16bit(x, lift, reciprocal)
    else:
        return tl.math.div_rn(x, scale)


@triton.jit
def code(x, scale, FP8: tl.constexpr, NARROW: tl.constexpr, NATIVE: tl.constexpr):
    """The FP8 (uint8) or INT8 code nearest to x / scale, both fp32, ties to even, saturating."""
    if FP8:
        return e4m3_code(ratio(x, scale, NARROW), NATIVE)
    else:
        return round_half_even(tl.clamp(ratio(x, scale, NARROW), -128.0, 127.0)).to(tl.int8)
