"""Fused experts to FP8 or INT8 rows: the transpose, a scale per output channel, one read.

Meaning: `reference.quantize.quantize_experts`. Llama-4 stores [E, H, 2I] with the input dimension
first, engines want every expert's [2I, H], and a scale needs all of a column before any of its
codes. A column strip of a few MB is therefore read twice in a row, the second time from the L2
cache: a run of programs finds the maxima of strip s, the run after it quantizes strip s - 1 once
its counter says that its maxima are complete. A program waits only for programs of smaller number,
which a GPU starts first (as the look-back scans of CUB rely on too), so it never waits for ever.
Maxima of integers do not depend on order.

A thread puts the codes of four rows as stored together, and whole words are transposed.

Shape letters: E experts, K input features (rows as stored), N output channels (columns as stored),
4 x P the rows of a tile, L its columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.codes import (
    HALF_RANGE,
    absmax_of,
    code_constexprs,
    empty_codes,
    load_slices,
    scale_of,
    word_of_codes,
)
from ckptq.kernels.rounding import narrow

TILE_K, TILE_N = 128, 128
"""Rows and columns of a tile: 256 bytes of bf16 where it is read, 128 of codes where written."""


@triton.jit
def _quantize_experts_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    amax_ptr,
    done_ptr,
    stride_e,
    stride_k,
    E,
    K,
    N,
    strips,
    strip_tiles,
    HALF_RANGE: tl.constexpr,
    FP8: tl.constexpr,
    NARROW: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
):
    tiles = tl.cdiv(K, TILE_K) * strip_tiles  # in a strip
    second = tl.program_id(0) % (2 * tiles) >= tiles
    strip = tl.program_id(0) // (2 * tiles) - second.to(tl.int32)
    if (strip >= 0) & (strip < E * strips):
        e = (strip // strips).to(tl.int64)
        tile = tl.program_id(0) % tiles
        n_tile = (strip % strips) * strip_tiles + tile % strip_tiles
        n_L = n_tile * TILE_N + tl.arange(0, TILE_N)
        word_P = (tile // strip_tiles).to(tl.int64) * (TILE_K // 4) + tl.arange(0, TILE_K // 4)
        m_PL = (word_P < K // 4)[:, None] & (n_L < N)[None, :]
        x_ptrs = x_ptr + e * stride_e + 4 * word_P[:, None] * stride_k + n_L[None, :]
        amax_ptrs = amax_ptr + e * N + n_L
        if second:
            x_4PL = load_slices(x_ptrs, stride_k, m_PL, 4, "evict_first")
            while tl.atomic_add(done_ptr + strip, 0, sem="acquire") < tiles:
                pass
            bits_L = tl.load(amax_ptrs, mask=n_L < N, other=0, cache_modifier=".cg")
            stored: tl.constexpr = scale_ptr.dtype.element_ty
            scale_L = scale_of(bits_L.to(tl.float32, bitcast=True), HALF_RANGE, stored)
            if tile < strip_tiles:  # the first row of tiles
                tl.store(scale_ptr + e * N + n_L, narrow(scale_L, stored), mask=n_L < N)
            word_PL = word_of_codes(x_4PL, scale_L[None, :], FP8, NARROW, NATIVE)
            o_PL = (e * N + n_L)[None, :] * (K // 4) + word_P[:, None]
            tl.store(code_ptr + o_PL, word_PL, mask=m_PL)
        else:
            x_4PL = load_slices(x_ptrs, stride_k, m_PL, 4, "evict_last")
            # bits of positive floats are in the order of the floats
            bits_L = tl.max(absmax_of(x_4PL, 4), 0).to(tl.int32, bitcast=True)
            tl.atomic_max(amax_ptrs, bits_L, mask=n_L < N, sem="relaxed")
            # all threads' maxima before the one thread that counts the tile
            tl.debug_barrier()
            tl.atomic_add(done_ptr + strip, 1, sem="release")


def quantize_experts(
    x_EKN: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, strip_bytes: int = 16 << 20
) -> tuple[Tensor, Tensor]:
    """Codes [E, N, K] and scales [E, N, 1] in x's dtype, of the rows of every x[e].T.

    `x_EKN` may be a slice of columns, as gate = x[:, :, :I] and up = x[:, :, I:]. Two strips of
    `strip_bytes` should fit the L2 cache; that changes the speed alone. K is a multiple of 4.
    """
    E, K, N = x_EKN.shape
    if x_EKN.stride(2) != 1 or K % 4:
        raise ValueError(f"want dense columns, rows in fours: {x_EKN.shape} {x_EKN.stride()}")
    tiles_down, tiles_across = triton.cdiv(K, TILE_K), triton.cdiv(N, TILE_N)
    column_bytes = K * TILE_N * x_EKN.element_size()
    strips = min(tiles_across, triton.cdiv(tiles_across * column_bytes, strip_bytes))
    strip_tiles = triton.cdiv(tiles_across, strips)
    code_ENK = empty_codes((E, N, K), dtype, x_EKN.device)
    scale_EN1 = torch.empty(E, N, 1, dtype=x_EKN.dtype, device=x_EKN.device)
    amax_EN = torch.zeros(E, N, dtype=torch.int32, device=x_EKN.device)
    done = torch.zeros(E * strips, dtype=torch.int32, device=x_EKN.device)
    _quantize_experts_kernel[(2 * (E * strips + 1) * tiles_down * strip_tiles,)](
        *(x_EKN, code_ENK.view(torch.int32), scale_EN1, amax_EN, done),
        *(x_EKN.stride(0), x_EKN.stride(1), E, K, N, strips, strip_tiles),
        HALF_RANGE=HALF_RANGE[dtype],
        **code_constexprs(x_EKN, x_EKN.dtype, dtype),
        TILE_K=TILE_K,
        TILE_N=TILE_N,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return code_ENK.view(dtype), scale_EN1
