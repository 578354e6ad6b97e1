"""FP8 and INT8 with a scale per row: weights per output channel, activations per token.

Meaning: `reference.quantize_rows`. A program holds whole rows in registers, so the input
is read once; rows of more than 32768 columns are read twice. Bound by memory: 3 bytes a bf16
element. Output rows may be taken in another RoPE order; only addresses change.

Shape letters: R rows, C columns, B block of columns, S slices of a row, each a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize.row_order import order_constexprs, source_row
from ckptq.kernels.quantize.slices import (
    HALF_RANGE,
    absmax_of,
    code,
    code_constexprs,
    empty_codes,
    scale_of,
)
from ckptq.kernels.rounding import narrow, widen
from ckptq.rope_order import Heads, RopeOrder

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
    HALF_RANGE: tl.constexpr,
    FP8: tl.constexpr,
    NARROW: tl.constexpr,
    NATIVE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    TO_HALF_SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source_R = source_row(row_R, HEAD_DIM, ROTARY_DIM, TO_HALF_SPLIT)
    col_1B = tl.arange(0, BLOCK)[None, :]
    m_R1 = (row_R < R)[:, None]
    x_ptrs = x_ptr + source_R[:, None] * x_stride + col_1B
    x_SRB = (tl.load(x_ptrs, mask=m_R1 & (col_1B < C), other=0.0),)  # SLICES of [ROWS, BLOCK]
    for s in tl.static_range(1, SLICES):
        m_RB = m_R1 & (col_1B < C - s * BLOCK)
        x_SRB = x_SRB + (tl.load(x_ptrs + s * BLOCK, mask=m_RB, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005

    stored: tl.constexpr = scale_ptr.dtype.element_ty
    scale_R = scale_of(tl.max(absmax_of(x_SRB, SLICES), 1), HALF_RANGE, stored)  # [ROWS]
    tl.store(scale_ptr + row_R, narrow(scale_R, stored), mask=row_R < R)
    code_ptrs = code_ptr + row_R[:, None] * C + col_1B
    for s in tl.static_range(SLICES):
        code_RB = code(widen(x_SRB[s]), scale_R[:, None], FP8, NARROW, NATIVE)
        tl.store(code_ptrs + s * BLOCK, code_RB, mask=m_R1 & (col_1B < C - s * BLOCK))


@triton.jit
def _quantize_long_rows_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    x_stride,
    C,
    HALF_RANGE: tl.constexpr,
    FP8: tl.constexpr,
    NARROW: tl.constexpr,
    NATIVE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    TO_HALF_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += source_row(row, HEAD_DIM, ROTARY_DIM, TO_HALF_SPLIT) * x_stride
    amax_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        col_B = start + tl.arange(0, BLOCK)
        x_B = widen(tl.load(x_ptr + col_B, mask=col_B < C, other=0.0))
        amax_B = tl.maximum(amax_B, tl.abs(x_B))

    stored: tl.constexpr = scale_ptr.dtype.element_ty
    scale = scale_of(tl.max(amax_B, 0), HALF_RANGE, stored)
    tl.store(scale_ptr + row, narrow(scale, stored))
    for start in range(0, C, BLOCK):
        col_B = start + tl.arange(0, BLOCK)
        x_B = widen(tl.load(x_ptr + col_B, mask=col_B < C, other=0.0))
        code_B = code(x_B, scale, FP8, NARROW, NATIVE)
        tl.store(code_ptr + row * C + col_B, code_B, mask=col_B < C)


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


def quantize_rows(
    x_RC: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> tuple[Tensor, Tensor]:
    """Codes [R, C] of `dtype` (float8_e4m3fn or int8) and scales [R, 1] in x's dtype.

    With `heads`, row r of the result is row `gather_indices(heads, to)[r]` of x. Per-token groups
    of 128 are rows too: `quantize_rows(x_TC.view(-1, 128))`.
    """
    R, C = x_RC.shape
    if x_RC.stride(1) != 1:
        raise ValueError(f"want dense columns, got {tuple(x_RC.shape)} strided {x_RC.stride()}")
    code_RC = empty_codes((R, C), dtype, x_RC.device)
    scale_R1 = torch.empty(R, 1, dtype=x_RC.dtype, device=x_RC.device)
    switches = code_constexprs(x_RC, x_RC.dtype, dtype) | order_constexprs(heads, to, R)
    if C > LONGEST_ROW:
        _quantize_long_rows_kernel[(R,)](
            *(x_RC, code_RC, scale_R1, x_RC.stride(0), C),
            HALF_RANGE=HALF_RANGE[dtype],
            **switches,
            BLOCK=8192,
            num_warps=8,
            enable_fp_fusion=False,
        )
        return code_RC.view(dtype), scale_R1
    tiling = _tiling(C, x_RC.element_size())
    _quantize_rows_kernel[(triton.cdiv(R, tiling["ROWS"]),)](
        *(x_RC, code_RC, scale_R1, x_RC.stride(0), R, C),
        HALF_RANGE=HALF_RANGE[dtype],
        **switches,
        **tiling,
        enable_fp_fusion=False,
    )
    return code_RC.view(dtype), scale_R1
