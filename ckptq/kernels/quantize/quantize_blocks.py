"""FP8 and INT8 with a scale per block of 128 x 128, found in the same pass.

Meaning: `reference.quantize_blocks`. A program holds one block; blocks at the edges are
filled with zeros, which no maximum notices. One read, one write.

Shape letters: R rows, C columns, G x K the grid of blocks; B, L the rows and columns of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize import reference
from ckptq.kernels.quantize.slices import code, code_switches, empty_codes, scale_of_codes
from ckptq.kernels.rounding import narrow, widen


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
    x_RC: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    block: tuple[int, int] = (128, 128),
) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and scales [ceil(R / 128), ceil(C / 128)] in x's dtype."""
    if block[0] * block[1] > 1 << 15 or any(side & (side - 1) for side in block):
        return reference.quantize_blocks(x_RC, dtype, block)  # more than a program holds
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
