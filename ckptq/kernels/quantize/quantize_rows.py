"""FP8 and INT8 with a scale per row (output channel or token) or per block, found in the same pass.

Meaning: `reference_quantize.quantize_rows`, `.quantize_blocks`. A program holds whole rows, or a
block, in registers, so the input is read once; rows of more than 32768 columns are read twice.
Bound by memory: 3 bytes a bf16 element. Blocks at the edges are filled with zeros, which no maximum
notices.

Shape letters: R rows, C columns, B block of columns, S slices of a row, each a block; G x K the
grid of blocks, and B, L the rows and columns of one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize.quantize_static import quantize_static
from ckptq.kernels.quantize.slices import (
    absmax_of,
    code,
    code_switches,
    empty_codes,
    scale_of_codes,
)
from ckptq.kernels.rounding import narrow, widen

LONGEST_ROW = 32768
"""Columns that one program still holds in its registers."""


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    x_stride,
    R,
    C,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col_1B = tl.arange(0, BLOCK)[None, :]
    m_R1 = (row_R < R)[:, None]
    x_ptrs = x_ptr + row_R[:, None] * x_stride + col_1B
    x_SRB = (tl.load(x_ptrs, mask=m_R1 & (col_1B < C), other=0.0),)  # SLICES of [ROWS, BLOCK]
    for s in tl.static_range(1, SLICES):
        m_RB = m_R1 & (col_1B < C - s * BLOCK)
        x_SRB = x_SRB + (tl.load(x_ptrs + s * BLOCK, mask=m_RB, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005

    stored: tl.constexpr = scale_ptr.dtype.element_ty
    scale_R = scale_of_codes(tl.max(absmax_of(x_SRB), 1), CODES, stored)  # [ROWS]
    tl.store(scale_ptr + row_R, narrow(scale_R, stored), mask=row_R < R)
    code_ptrs = code_ptr + row_R[:, None] * C + col_1B
    for s in tl.static_range(SLICES):
        code_RB = code(widen(x_SRB[s]), scale_R[:, None], CODES)
        tl.store(code_ptrs + s * BLOCK, code_RB, mask=m_R1 & (col_1B < C - s * BLOCK))


def _tiling(columns: int, itemsize: int) -> dict[str, int]:
    """What a program holds: several short rows, or a long one in slices of 4096 columns.

    One block of the next power of two would cost a row of 28672 the registers of 4096 more.
    """
    if columns <= 8192:
        block = triton.next_power_of_2(columns)
        rows = max(1, 4096 // block)
        return {"ROWS": rows, "SLICES": 1, "BLOCK": block, "num_warps": max(4, block // 1024)}
    slices = triton.cdiv(columns, 4096)
    return {"ROWS": 1, "SLICES": slices, "BLOCK": 4096, "num_warps": 2 * itemsize}


def quantize_rows(x_RC: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Codes [R, C] of `dtype` (float8_e4m3fn or int8) and scales [R, 1] in x's dtype.

    Per-token groups of 128 are rows too: `quantize_rows(x_TC.view(-1, 128))`.
    """
    R, C = x_RC.shape
    if x_RC.stride(1) != 1:
        raise ValueError(f"want dense columns, got {tuple(x_RC.shape)} strided {x_RC.stride()}")
    if C > LONGEST_ROW:
        amax_R1 = torch.linalg.vector_norm(x_RC, torch.inf, 1, keepdim=True)
        half_range = 448.0 if dtype == torch.float8_e4m3fn else 127.5
        scale_R1 = (amax_R1.double() / half_range).float().to(x_RC.dtype)
        scale_R1.masked_fill_(scale_R1 == 0, torch.finfo(x_RC.dtype).eps)
        return quantize_static(x_RC, scale_R1, (1, C), dtype), scale_R1
    code_RC = empty_codes((R, C), dtype, x_RC.device)
    scale_R1 = torch.empty(R, 1, dtype=x_RC.dtype, device=x_RC.device)
    tiling = _tiling(C, x_RC.element_size())
    _quantize_rows_kernel[(triton.cdiv(R, tiling["ROWS"]),)](
        *(x_RC, code_RC, scale_R1, x_RC.stride(0), R, C),
        CODES=code_switches(x_RC, x_RC.dtype, dtype),
        **tiling,
        enable_fp_fusion=False,
    )
    return code_RC.view(dtype), scale_R1


@triton.jit
def _quantize_blocks_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    x_stride,
    R,
    C,
    CODES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    # columns of blocks vary fastest, so that programs running together read whole rows
    K = tl.cdiv(C, BLOCK_COLS)
    g = tl.program_id(0) // K
    k = tl.program_id(0) % K
    row_B = g.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_L = k * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    m_BL = (row_B < R)[:, None] & (col_L < C)[None, :]
    x_BL = tl.load(x_ptr + row_B[:, None] * x_stride + col_L[None, :], mask=m_BL, other=0.0)
    x_BL = widen(x_BL)  # [BLOCK_ROWS, BLOCK_COLS]

    stored: tl.constexpr = scale_ptr.dtype.element_ty
    scale = scale_of_codes(tl.max(tl.max(tl.abs(x_BL), 1), 0), CODES, stored)
    tl.store(scale_ptr + tl.program_id(0), narrow(scale, stored))
    code_BL = code(x_BL, scale, CODES)
    tl.store(code_ptr + row_B[:, None] * C + col_L[None, :], code_BL, mask=m_BL)


def quantize_blocks(
    x_RC: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and scales [ceil(R / 128), ceil(C / 128)] in x's dtype. Sides are powers of two,
    for no more than 2^15 elements: what a program holds."""
    R, C = x_RC.shape
    if x_RC.stride(1) != 1:
        raise ValueError(f"want dense columns: {x_RC.stride()}")
    G, K = triton.cdiv(R, block[0]), triton.cdiv(C, block[1])
    code_RC = empty_codes((R, C), dtype, x_RC.device)
    scale_GK = torch.empty(G, K, dtype=x_RC.dtype, device=x_RC.device)
    _quantize_blocks_kernel[(G * K,)](
        *(x_RC, code_RC, scale_GK, x_RC.stride(0), R, C),
        CODES=code_switches(x_RC, x_RC.dtype, dtype),
        BLOCK_ROWS=block[0],
        BLOCK_COLS=block[1],
        num_warps=4,
        enable_fp_fusion=False,
    )
    return code_RC.view(dtype), scale_GK
