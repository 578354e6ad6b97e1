"""From the extremes of a tile to its scale and zero point, as llm-compressor finds them.

All of it is arithmetic in the dtype of the weight, in compressed-tensors' order of operations
(`calculate_qparams`, `generate_gparam`, `generate_mx_scales`), because the stored bits depend on
it. Divisors are tensors: torch's CUDA division by a Python number multiplies by its reciprocal.
Scales are finite and positive; where theirs are not, the docstring says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptq.quantize.tiles import BITS

E2M1_MAX, E4M3_MAX = 6.0, 448.0

EIGHTH = 0x20
"""0.125 in E4M3."""

# dtype: bits of its mantissa, bias of its exponent
FLOATS = {
    torch.bfloat16: (7, 127),
    torch.float16: (10, 15),
    torch.float32: (23, 127),
    torch.float64: (52, 1023),
}


def symmetric(amax: Tensor, half_range: float) -> Tensor:
    """amax / half_range; where that is zero (all-zero tile, underflow), the dtype's eps."""
    return _positive(amax / amax.new_full((), half_range))


def asymmetric(low: Tensor, high: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Scale (high - low) / (2^bits - 1), and the int8 zero point that puts low on the least code.

    `low` <= 0 <= `high`. An all-zero tile has the scale eps and the zero point 0 (in llm-compressor
    that is a cast of NaN, which happens to give 0 on x86). Where high - low overflows the dtype,
    each is divided first; llm-compressor's scale is Inf there.
    """
    least, steps = -(2 ** (num_bits - 1)), high.new_full((), 2**num_bits - 1)
    extent = high - low
    scale = torch.where(extent.isinf(), high / steps - low / steps, extent / steps)
    zero_point = (least - low / scale).nan_to_num(nan=0.0).clamp(least, -least - 1)
    return _positive(scale), zero_point.round().to(torch.int8)


def mx_exponent(amax: Tensor, num_bits: int) -> Tensor:
    """E8M0 scale (uint8: exponent + 127) of a group for MXFP4 (4 bits) or MXFP8 (8 bits).

    The power of two of amax, counted one higher from 1.75 up (what E2M1 would round up), less the
    exponent of the element type's maximum. llm-compressor keeps the scale in the weight's dtype
    on the way: where float16 cannot hold it, the scale becomes 1. Where rounding up ends at
    2^128, llm-compressor's scale is not finite; here amax counts as 2^127, and saturates.
    """
    mantissa, bias = FLOATS[amax.dtype]
    bits = amax.view(BITS[amax.itemsize]).long()
    biased = (bits + (1 << mantissa - 2)) >> mantissa
    exponent = torch.where(biased == 0, 0, biased - bias + 127).clamp(max=254)
    exponent = (exponent - {4: 2, 8: 8}[num_bits]).clamp(min=0)
    if amax.dtype == torch.float16:
        exponent = torch.where(exponent < 127 - 24, 127, exponent)
    return exponent.to(torch.uint8)


def mx_scale(exponent: Tensor) -> Tensor:
    """2 ** (exponent - 127) in float32, put together from bits; 0 is the subnormal 2^-127."""
    return (exponent.int() << 23).clamp(min=1 << 22).view(torch.float32)


def nvfp4_global(amax: Tensor) -> Tensor:
    """[1] float32: 448 * 6 / amax, which spreads the scales of groups over E4M3.

    amax is that of all weights that inference fuses. Divided in its dtype and by way of the
    reciprocal, as torch does `float / Tensor`; 1 where that overflows (in float16 from an amax of
    0.041 down).
    """
    amax = amax.reshape(1).clamp(min=torch.finfo(amax.dtype).tiny)
    return (E4M3_MAX * E2M1_MAX / amax).float().nan_to_num(nan=1.0, posinf=1.0)


def nvfp4(amax: Tensor, global_scale: Tensor) -> Tensor:
    """E4M3 scale of a group: global_scale * amax / 6, and 0.125 where that rounds to zero."""
    scale = global_scale * (amax / amax.new_full((), E2M1_MAX))
    stored = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    bits = stored.view(torch.uint8)
    bits.masked_fill_(bits == 0, EIGHTH)
    return stored


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
