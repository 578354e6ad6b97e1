"""FP8 and INT8 with one scale per tensor or per head, found from the data.

Meaning: `reference.quantize_tensor` and `.quantize_heads`. The scale is known only after
the last element, so the input is read twice: a pass of maxima and `quantize_static`. Maxima are
folded by atomics on integers, of which the order does not matter.

Shape letters: R rows, C columns, K scales along the columns, T tokens, H heads, D head dimension,
B block of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize.quantize_static import quantize_static, tile_grid, tile_of_program
from ckptq.kernels.quantize.slices import HALF_RANGE, scale_of
from ckptq.kernels.rounding import narrow, widen


@triton.jit
def _absmax_kernel(
    x_ptr,
    amax_ptr,
    x_stride,
    R,
    C,
    tile_cols,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R, col_B, m_RB, k = tile_of_program(R, C, tile_cols, ROWS, SLICES, BLOCK)
    x_RB = tl.load(x_ptr + row_R[:, None] * x_stride + col_B[None, :], mask=m_RB, other=0.0)
    amax = tl.max(tl.max(tl.abs(widen(x_RB)), 1), 0)
    # bits of positive floats are in the order of the floats
    tl.atomic_max(amax_ptr + k, amax.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _scales_kernel(amax_ptr, scale_ptr, K, HALF_RANGE: tl.constexpr, BLOCK: tl.constexpr):
    k_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    amax_B = tl.load(amax_ptr + k_B, mask=k_B < K, other=0).to(tl.float32, bitcast=True)
    stored: tl.constexpr = scale_ptr.dtype.element_ty
    tl.store(scale_ptr + k_B, narrow(scale_of(amax_B, HALF_RANGE, stored), stored), mask=k_B < K)


def scales_of_maxima(amax: Tensor, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Scales of `dtype` codes, in the dtype `stored`, from fp32 maxima given as int32 bits."""
    scale = torch.empty(amax.shape, dtype=stored, device=amax.device)
    _scales_kernel[(triton.cdiv(amax.numel(), 128),)](
        *(amax, scale, amax.numel()),
        HALF_RANGE=HALF_RANGE[dtype],
        BLOCK=128,
        enable_fp_fusion=False,
    )
    return scale


def scale_columns(x_RC: Tensor, tile_cols: int, dtype: torch.dtype) -> Tensor:
    """A scale for every run of `tile_cols` columns over all rows: [1, K], x's dtype."""
    R, C = x_RC.shape
    if x_RC.stride(1) != 1:
        raise ValueError(f"want dense columns, got {tuple(x_RC.shape)} strided {x_RC.stride()}")
    K = triton.cdiv(C, tile_cols)
    amax_1K = torch.zeros(1, K, dtype=torch.int32, device=x_RC.device)
    (down, across), blocks = tile_grid(R, C, tile_cols)
    _absmax_kernel[(down * across,)](
        *(x_RC, amax_1K, x_RC.stride(0), R, C, tile_cols),
        **blocks,
        num_warps=8,
    )
    return scales_of_maxima(amax_1K, x_RC.dtype, dtype)


def quantize_tensor(
    x_RC: Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and one scale [1] in x's dtype; without rows that of a maximum of zero."""
    R, C = x_RC.shape
    scale_11 = scale_columns(x_RC, C, dtype)
    # no rows, no tile
    return quantize_static(x_RC, scale_11[:R], (max(R, 1), C), dtype), scale_11[0]


def quantize_heads(
    x_THD: Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Codes [T, H, D] and scales [H] in x's dtype. D need not be a power of two."""
    T, _, D = x_THD.shape
    x_TC = x_THD.flatten(1)
    scale_1H = scale_columns(x_TC, D, dtype)
    code_TC = quantize_static(x_TC, scale_1H[:T], (max(T, 1), D), dtype)
    return code_TC.view(x_THD.shape), scale_1H[0]
