"""What a search of ranges adds up: how far the weights of a tile end from themselves, under each
of several scales.

Meaning: `ckptq.quantize.tile_error.powered_errors`, every step rounded to the 16 bits of the
weight. Powers are looked up among those that the CPU has found; the sums are of float64, in which
numbers of 16 bits lose next to nothing, and are rounded once. Bound by arithmetic: some forty
instructions for each weight under each scale; the weights stay in the cache.

Shape letters: K scales, T tiles, L weights of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.rounding import e4m3_round, has_native_e4m3, narrow, round_half_even, widen

E2M1 = tl.constexpr(4)
"""Bits of a code that is no integer: these or, for E4M3, 8."""


@triton.jit
def _e2m1_round(x):
    """fp32 -> the nearest E2M1 number, ties to even, saturating at 6."""
    x = tl.clamp(x, -6.0, 6.0)
    # half the power of two of the number, of 1 at least, is what numbers are apart there
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    room = (power - 0x800000).to(tl.float32, bitcast=True) * 12582912.0  # 1.5 * 2^23
    return (x + room) - room


@triton.jit
def _error_sums_kernel(
    x_ptr,
    scale_ptr,
    zero_ptr,
    power_ptr,
    sum_ptr,
    T,
    L,
    MOST: tl.constexpr,
    FLOAT_BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    t_T = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    m_T = t_T < T
    at_T = tl.program_id(1).to(tl.int64) * T + t_T
    scale_T1 = widen(tl.load(scale_ptr + at_T, mask=m_T, other=1.0))[:, None]
    if zero_ptr is None:
        zero_T1 = 0.0
    else:
        zero_T1 = tl.load(zero_ptr + at_T, mask=m_T, other=0).to(tl.float32)[:, None]
    sum_T = tl.zeros((TILES,), tl.float64)
    for first in range(0, L, LANES):
        l_1L = first + tl.arange(0, LANES)[None, :]
        m_TL = m_T[:, None] & (l_1L < L)
        x_TL = widen(tl.load(x_ptr + t_T[:, None] * L + l_1L, mask=m_TL, other=0.0))
        q_TL = widen(narrow(tl.math.div_rn(x_TL, scale_T1), dtype))
        if FLOAT_BITS == 0:
            q_TL = widen(narrow(q_TL + zero_T1, dtype))
            q_TL = round_half_even(tl.clamp(q_TL, -MOST - 1.0, MOST)).to(tl.float32) - zero_T1
        elif FLOAT_BITS == E2M1:
            q_TL = _e2m1_round(q_TL)
        else:
            q_TL = e4m3_round(tl.clamp(q_TL, -448.0, 448.0), NATIVE)
        back_TL = widen(narrow(q_TL * scale_T1, dtype))
        error_TL = narrow(tl.abs(back_TL - x_TL), dtype).to(tl.int16, bitcast=True)
        # past the end weights and errors are zero, and so is that power
        power_TL = widen(tl.load(power_ptr + error_TL.to(tl.int32)))
        sum_T += tl.sum(power_TL.to(tl.float64), 1)
    tl.store(sum_ptr + at_T, sum_T.to(tl.float32), mask=m_T)


def error_sums(
    x_TL: Tensor,
    scale_KT: Tensor,
    zero_point_KT: Tensor | None,
    power_N: Tensor,
    codes: tuple[str, int],
) -> Tensor:
    """float32 [K, T]: sums of |dequantized - x|^norm, `power_N` [32768] of which has the powers of
    all numbers >= 0 of x's dtype (bf16 or fp16) by their bits.

    All are dense; zero points are int8. `codes` are "int" or "float", and the bits of one.
    """
    (T, L), K = x_TL.shape, len(scale_KT)
    lanes = min(triton.next_power_of_2(L), 1024)
    tiles = 1024 // lanes
    kind, bits = codes
    sum_KT = torch.empty(K, T, dtype=torch.float32, device=x_TL.device)
    _error_sums_kernel[(triton.cdiv(T, tiles), K)](
        *(x_TL, scale_KT, zero_point_KT, power_N, sum_KT, T, L),
        MOST=2.0 ** (bits - 1) - 1,
        FLOAT_BITS=bits if kind == "float" else 0,
        NATIVE=has_native_e4m3(x_TL.device),
        TILES=tiles,
        LANES=lanes,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return sum_KT
