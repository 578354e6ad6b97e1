"""Fused experts to FP8 or INT8 rows: the transpose folded in, a scale per output channel.

Meaning: `reference.quantize_experts`. Llama-4 stores [E, H, 2I] with the input dimension
first, engines want every expert's [2I, H], and a scale needs all of a column before any of its
codes: one pass finds the maxima, another quantizes. (Reading a strip of columns a second time from
the L2 cache, behind a counter, was slower than reading everything twice.) Maxima of integers do not
depend on order.

A thread puts the codes of four rows as stored together, and whole words are transposed.

Shape letters: E experts, K input features (rows as stored), N output channels (columns as stored),
4 x P the rows of a tile, L its columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize.quantize_tensor import scales_of_maxima
from ckptq.kernels.quantize.slices import (
    absmax_of,
    code_constexprs,
    empty_codes,
    load_slices,
    word_of_codes,
)
from ckptq.kernels.rounding import widen

TILE_K, TILE_N, WARPS = 256, 64, 4
"""Rows and columns of a tile: 128 bytes of bf16 where it is read, 256 of codes where written."""


@triton.jit
def _tile_of_experts(K, N, TILE_K: tl.constexpr, TILE_N: tl.constexpr):
    """Expert (int64), words [P], columns [L] and mask [P, L] of a program, columns fastest."""
    across, down = tl.cdiv(N, TILE_N), tl.cdiv(K, TILE_K)
    e = (tl.program_id(0) // (across * down)).to(tl.int64)
    tile = tl.program_id(0) % (across * down)
    n_L = tile % across * TILE_N + tl.arange(0, TILE_N)
    word_P = (tile // across).to(tl.int64) * (TILE_K // 4) + tl.arange(0, TILE_K // 4)
    return e, word_P, n_L, (word_P < K // 4)[:, None] & (n_L < N)[None, :]


@triton.jit
def _column_maxima_kernel(
    x_ptr,
    amax_ptr,
    stride_e,
    stride_k,
    K,
    N,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
):
    e, word_P, n_L, m_PL = _tile_of_experts(K, N, TILE_K, TILE_N)
    x_ptrs = x_ptr + e * stride_e + 4 * word_P[:, None] * stride_k + n_L[None, :]
    amax_L = tl.max(absmax_of(load_slices(x_ptrs, stride_k, m_PL, 4, ""), 4), 0)
    # bits of positive floats are in the order of the floats
    bits_L = amax_L.to(tl.int32, bitcast=True)
    tl.atomic_max(amax_ptr + e * N + n_L, bits_L, mask=n_L < N, sem="relaxed")


@triton.jit
def _quantize_experts_kernel(
    x_ptr,
    scale_ptr,
    code_ptr,
    stride_e,
    stride_k,
    K,
    N,
    FP8: tl.constexpr,
    NARROW: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N: tl.constexpr,
):
    e, word_P, n_L, m_PL = _tile_of_experts(K, N, TILE_K, TILE_N)
    x_ptrs = x_ptr + e * stride_e + 4 * word_P[:, None] * stride_k + n_L[None, :]
    x_4PL = load_slices(x_ptrs, stride_k, m_PL, 4, "")
    scale_L = widen(tl.load(scale_ptr + e * N + n_L, mask=n_L < N, other=1.0))
    word_PL = word_of_codes(x_4PL, scale_L[None, :], FP8, NARROW, NATIVE)
    o_PL = (e * N + n_L)[None, :] * (K // 4) + word_P[:, None]
    tl.store(code_ptr + o_PL, word_PL, mask=m_PL)


def quantize_experts(
    x_EKN: Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Codes [E, N, K] and scales [E, N, 1] in x's dtype, of the rows of every x[e].T.

    `x_EKN` may be a slice of columns, as gate = x[:, :, :I] and up = x[:, :, I:]. K is a multiple
    of 4.
    """
    E, K, N = x_EKN.shape
    if x_EKN.stride(2) != 1 or K % 4:
        raise ValueError(f"want dense columns, rows in fours: {x_EKN.shape} {x_EKN.stride()}")
    code_ENK = empty_codes((E, N, K), dtype, x_EKN.device)
    amax_EN = torch.zeros(E, N, dtype=torch.int32, device=x_EKN.device)
    where = (x_EKN.stride(0), x_EKN.stride(1), K, N)
    tiles = (E * triton.cdiv(K, TILE_K) * triton.cdiv(N, TILE_N),)
    _column_maxima_kernel[tiles](
        *(x_EKN, amax_EN, *where), TILE_K=TILE_K, TILE_N=TILE_N, num_warps=WARPS
    )
    scale_EN = scales_of_maxima(amax_EN, x_EKN.dtype, dtype)
    _quantize_experts_kernel[tiles](
        *(x_EKN, scale_EN, code_ENK.view(torch.int32), *where),
        **code_constexprs(x_EKN, x_EKN.dtype, dtype),
        TILE_K=TILE_K,
        TILE_N=TILE_N,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return code_ENK.view(dtype), scale_EN[..., None]
