"""Fused experts to FP8 or INT8 with a scale per block of 128 x 128, the transpose folded in.

Meaning: `reference.quantize_expert_blocks`. A block of the transpose is a transposed
block, so one program does one and nothing is read twice. Words of four codes are transposed, as in
`quantize_experts`.

Shape letters: E experts, K input features (rows as stored), N output channels (columns as stored),
4 x P the rows of a block as stored, L its columns, G x H the grid of blocks of the transpose.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize.slices import (
    HALF_RANGE,
    absmax_of,
    code_constexprs,
    empty_codes,
    load_slices,
    scale_of,
    word_of_codes,
)
from ckptq.kernels.rounding import narrow


@triton.jit
def _quantize_expert_blocks_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    stride_e,
    stride_k,
    K,
    N,
    HALF_RANGE: tl.constexpr,
    FP8: tl.constexpr,
    NARROW: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks_k, blocks_n = tl.cdiv(K, BLOCK), tl.cdiv(N, BLOCK)
    e = (tl.program_id(0) // (blocks_k * blocks_n)).to(tl.int64)
    block_k = tl.program_id(0) // blocks_n % blocks_k
    block_n = tl.program_id(0) % blocks_n
    word_P = block_k.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    n_L = block_n * BLOCK + tl.arange(0, BLOCK)
    m_PL = (word_P < K // 4)[:, None] & (n_L < N)[None, :]
    x_ptrs = x_ptr + e * stride_e + 4 * word_P[:, None] * stride_k + n_L[None, :]
    x_4PL = load_slices(x_ptrs, stride_k, m_PL, 4, "")

    stored: tl.constexpr = scale_ptr.dtype.element_ty
    scale = scale_of(tl.max(tl.max(absmax_of(x_4PL, 4), 1), 0), HALF_RANGE, stored)
    tl.store(scale_ptr + (e * blocks_n + block_n) * blocks_k + block_k, narrow(scale, stored))
    word_PL = word_of_codes(x_4PL, scale, FP8, NARROW, NATIVE)
    o_PL = (e * N + n_L)[None, :] * (K // 4) + word_P[:, None]
    tl.store(code_ptr + o_PL, word_PL, mask=m_PL)


def quantize_expert_blocks(
    x_EKN: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Codes [E, N, K] and scales [E, ceil(N / 128), ceil(K / 128)] of every x[e].T; 4 divides K.

    Raises ValueError for other K, columns that lie apart, blocks that are no power of two.
    """
    E, K, N = x_EKN.shape
    if block < 4 or block & (block - 1):
        raise ValueError(f"want blocks of a power of two, at least 4: {block}")
    if x_EKN.stride(2) != 1 or K % 4:
        raise ValueError(f"want dense columns, rows in fours: {x_EKN.shape} {x_EKN.stride()}")
    blocks_k, blocks_n = triton.cdiv(K, block), triton.cdiv(N, block)
    code_ENK = empty_codes((E, N, K), dtype, x_EKN.device)
    scale_EGH = torch.empty(E, blocks_n, blocks_k, dtype=x_EKN.dtype, device=x_EKN.device)
    _quantize_expert_blocks_kernel[(E * blocks_n * blocks_k,)](
        *(x_EKN, code_ENK.view(torch.int32), scale_EGH, x_EKN.stride(0), x_EKN.stride(1), K, N),
        HALF_RANGE=HALF_RANGE[dtype],
        **code_constexprs(x_EKN, x_EKN.dtype, dtype),
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return code_ENK.view(dtype), scale_EGH
