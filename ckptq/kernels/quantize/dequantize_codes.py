"""FP8 and INT8 codes back to values: code * scale, rounded once to the scale's dtype.

Meaning: `reference.dequantize`. Same tiles as `quantize_static`. One read, one write.

Shape letters: R rows, C columns, G x K the grid of scales, B block of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize.quantize_static import tile_grid, tile_of_program
from ckptq.kernels.rounding import e4m3_value, has_native_e4m3, narrow, widen


@triton.jit
def _dequantize_kernel(
    code_ptr,
    scale_ptr,
    x_ptr,
    R,
    C,
    K,
    tile_rows,
    tile_cols,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R, col_B, m_RB, k = tile_of_program(R, C, tile_cols, ROWS, SLICES, BLOCK)
    o_RB = row_R[:, None] * C + col_B[None, :]
    code_RB = tl.load(code_ptr + o_RB, mask=m_RB, other=0)
    scale_R = tl.load(scale_ptr + (row_R // tile_rows) * K + k, mask=row_R < R, other=0.0)
    value_RB = e4m3_value(code_RB, NATIVE) if FP8 else code_RB.to(tl.float32)
    value_RB *= widen(scale_R)[:, None]
    tl.store(x_ptr + o_RB, narrow(value_RB, x_ptr.dtype.element_ty), mask=m_RB)


def dequantize(code_RC: Tensor, scale_GK: Tensor, tile: tuple[int, int]) -> Tensor:
    """Values [R, C] in the scale's dtype; each scale covers `tile` rows x columns."""
    R, C = code_RC.shape
    K = triton.cdiv(C, tile[1])
    if tuple(scale_GK.shape) != (triton.cdiv(R, tile[0]), K):
        raise ValueError(f"scales {tuple(scale_GK.shape)} do not tile {R} x {C} by {tile}")
    if not (code_RC.is_contiguous() and scale_GK.is_contiguous()):
        raise ValueError(f"want dense codes, scales: {code_RC.stride()} {scale_GK.stride()}")
    fp8 = code_RC.dtype == torch.float8_e4m3fn
    x_RC = torch.empty(R, C, dtype=scale_GK.dtype, device=code_RC.device)
    (down, across), blocks = tile_grid(R, C, tile[1])
    _dequantize_kernel[(down * across,)](
        *(code_RC.view(torch.uint8) if fp8 else code_RC, scale_GK, x_RC, R, C, K, *tile),
        FP8=fp8,
        NATIVE=has_native_e4m3(code_RC.device),
        **blocks,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return x_RC
