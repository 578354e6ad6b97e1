"""FP8 and INT8 with one scale per tensor or per head, found from the data.

Meaning: `reference.quantize.quantize_tensor` and `.quantize_heads`. The scale is known only after
the last element, so the input is read twice: a pass of maxima, one per program, and
`quantize_static`. Maxima are folded by torch.amax: no atomics, nothing depends on order.

Shape letters: R rows, C columns, K scales along the columns, T tokens, H heads, D head dimension,
B block of columns, S partial maxima.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.codes import HALF_RANGE
from ckptq.kernels.quantize_static import quantize_static, tile_grid, tile_of_program
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
    row_R, col_B, m_RB, _ = tile_of_program(R, C, tile_cols, ROWS, SLICES, BLOCK)
    x_RB = tl.load(x_ptr + row_R[:, None] * x_stride + col_B[None, :], mask=m_RB, other=0.0)
    amax = tl.max(tl.max(tl.abs(widen(x_RB)), 1), 0)
    tl.store(amax_ptr + tl.program_id(0), narrow(amax, amax_ptr.dtype.element_ty))


def absmax_columns(x_RC: Tensor, tile_cols: int) -> Tensor:
    """The absolute maximum of every run of `tile_cols` columns over all rows: [K], x's dtype."""
    R, C = x_RC.shape
    if x_RC.stride(1) != 1:
        raise ValueError(f"want dense columns, got {tuple(x_RC.shape)} strided {x_RC.stride()}")
    (down, across), blocks = tile_grid(R, C, tile_cols)
    amax_SK = torch.empty(down, across, dtype=x_RC.dtype, device=x_RC.device)
    _absmax_kernel[(down * across,)](
        *(x_RC, amax_SK, x_RC.stride(0), R, C, tile_cols),
        **blocks,
        num_warps=8,
    )
    return amax_SK.view(down, -1, blocks["SLICES"]).amax((0, 2))


def scale_of(amax_K: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales for maxima, in their dtype; eps where one comes out as zero."""
    # a tensor, as CUDA divides by a number by multiplying with its rounded reciprocal
    scale_K = amax_K / torch.full_like(amax_K, HALF_RANGE[dtype])
    return scale_K.masked_fill(scale_K == 0, torch.finfo(amax_K.dtype).eps)


def quantize_tensor(
    x_RC: Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and one scale [1] in x's dtype."""
    scale_1 = scale_of(absmax_columns(x_RC, x_RC.shape[1]), dtype)
    return quantize_static(x_RC, scale_1[None], (x_RC.shape[0], x_RC.shape[1]), dtype), scale_1


def quantize_heads(
    x_THD: Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Codes [T, H, D] and scales [H] in x's dtype. D need not be a power of two."""
    T, _, D = x_THD.shape
    x_TC = x_THD.flatten(1)
    scale_H = scale_of(absmax_columns(x_TC, D), dtype)
    return quantize_static(x_TC, scale_H[None], (T, D), dtype).view(x_THD.shape), scale_H
