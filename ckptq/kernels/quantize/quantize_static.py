"""FP8 and INT8 under scales that are already known, per tensor, channel, block or head, and back.

Meaning: `reference_quantize.quantize_static`, `.dequantize`. One scale covers a tile of the input;
a program stays inside one column of tiles, so it needs one scale a row. One read, one write.

Shape letters: R rows, C columns, G x K the grid of scales, B block of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize.slices import code, code_switches, empty_codes
from ckptq.kernels.rounding import e4m3_value, has_native_e4m3, narrow, widen


@triton.jit
def _its_tile(R, C, tile_cols, ROWS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of a program, and the column of scales that covers it.

    A column of tiles is cut into SLICES blocks of columns. Neighbouring programs take
    neighbouring columns, so that together they read whole rows.
    """
    slices = tl.cdiv(C, tile_cols) * SLICES
    row_R = (tl.program_id(0) // slices).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % slices // SLICES
    within_B = tl.program_id(0) % SLICES * BLOCK + tl.arange(0, BLOCK)
    col_B = k * tile_cols + within_B
    m_B = (within_B < tile_cols) & (col_B < C)
    return row_R, col_B, (row_R < R)[:, None] & m_B[None, :], k


def _tile_grid(rows: int, columns: int, tile_cols: int) -> tuple[tuple[int, int], dict[str, int]]:
    """How many programs `_its_tile` needs, rows x columns, and its compile-time arguments."""
    block = min(triton.next_power_of_2(tile_cols), 2048)
    slices = triton.cdiv(tile_cols, block)
    per_program = max(1, 8192 // block)
    programs = (triton.cdiv(rows, per_program), triton.cdiv(columns, tile_cols) * slices)
    return programs, {"ROWS": per_program, "SLICES": slices, "BLOCK": block}


@triton.jit
def _quantize_static_kernel(
    x_ptr,
    scale_ptr,
    code_ptr,
    x_stride,
    R,
    C,
    K,
    tile_rows,
    tile_cols,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R, col_B, m_RB, k = _its_tile(R, C, tile_cols, ROWS, SLICES, BLOCK)
    x_RB = tl.load(x_ptr + row_R[:, None] * x_stride + col_B[None, :], mask=m_RB, other=0.0)
    scale_R = tl.load(scale_ptr + (row_R // tile_rows) * K + k, mask=row_R < R, other=1.0)
    scale_R1 = widen(scale_R)[:, None]
    code_RB = code(widen(x_RB), scale_R1, CODES)
    tl.store(code_ptr + row_R[:, None] * C + col_B[None, :], code_RB, mask=m_RB)


def quantize_static(
    x_RC: Tensor, scale_GK: Tensor, tile: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn
) -> Tensor:
    """Codes [R, C]; each scale covers `tile` rows x columns of the result.

    Tiles: (R, C) per tensor, (1, C) per channel or token, (128, 128) per block, (T, D) per head of
    x [T, H * D].
    """
    R, C = x_RC.shape
    K = triton.cdiv(C, tile[1])
    if tuple(scale_GK.shape) != (triton.cdiv(R, tile[0]), K):
        raise ValueError(f"scales {tuple(scale_GK.shape)} do not tile {R} x {C} by {tile}")
    if x_RC.stride(1) != 1 or not scale_GK.is_contiguous():
        raise ValueError(f"want dense columns and scales, got {x_RC.stride()} {scale_GK.stride()}")
    code_RC = empty_codes((R, C), dtype, x_RC.device)
    (down, across), blocks = _tile_grid(R, C, tile[1])
    _quantize_static_kernel[(down * across,)](
        *(x_RC, scale_GK, code_RC, x_RC.stride(0), R, C, K, *tile),
        CODES=code_switches(x_RC, scale_GK.dtype, dtype),
        **blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return code_RC.view(dtype)


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
    row_R, col_B, m_RB, k = _its_tile(R, C, tile_cols, ROWS, SLICES, BLOCK)
    o_RB = row_R[:, None] * C + col_B[None, :]
    code_RB = tl.load(code_ptr + o_RB, mask=m_RB, other=0)
    scale_R = tl.load(scale_ptr + (row_R // tile_rows) * K + k, mask=row_R < R, other=0.0)
    value_RB = e4m3_value(code_RB, NATIVE) if FP8 else code_RB.to(tl.float32)
    value_RB *= widen(scale_R)[:, None]
    tl.store(x_ptr + o_RB, narrow(value_RB, x_ptr.dtype.element_ty), mask=m_RB)


def dequantize(code_RC: Tensor, scale_GK: Tensor, tile: tuple[int, int]) -> Tensor:
    """code * scale, [R, C], rounded once to the scale's dtype; each covers a `tile` as above."""
    R, C = code_RC.shape
    K = triton.cdiv(C, tile[1])
    if tuple(scale_GK.shape) != (triton.cdiv(R, tile[0]), K):
        raise ValueError(f"scales {tuple(scale_GK.shape)} do not tile {R} x {C} by {tile}")
    if not (code_RC.is_contiguous() and scale_GK.is_contiguous()):
        raise ValueError(f"want dense codes, scales: {code_RC.stride()} {scale_GK.stride()}")
    fp8 = code_RC.dtype == torch.float8_e4m3fn
    x_RC = torch.empty(R, C, dtype=scale_GK.dtype, device=code_RC.device)
    (down, across), blocks = _tile_grid(R, C, tile[1])
    _dequantize_kernel[(down * across,)](
        *(code_RC.view(torch.uint8) if fp8 else code_RC, scale_GK, x_RC, R, C, K, *tile),
        FP8=fp8,
        NATIVE=has_native_e4m3(code_RC.device),
        **blocks,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return x_RC
