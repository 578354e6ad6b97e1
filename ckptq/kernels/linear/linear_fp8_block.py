"""FP8 matrix product with weight scales per block of 128 x 128 and activations per 128 of a token.

Meaning: `reference.linear_w8a8` with those tiles. Scales change along K, so every 128
products are summed apart, scaled, and added in fp32.

Shape letters: M tokens, K input features, N output channels, G blocks along K, H blocks along N;
B, L the tile of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.linear.linear_w8a8 import block_m, fp8_dot, operand, tile_of_result
from ckptq.kernels.rounding import has_native_e4m3, narrow, widen

SIDE = 128
"""Side of a weight block, and columns of an activation group."""


@triton.jit
def _linear_fp8_block_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    a_stride,
    w_stride,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIDE: tl.constexpr,
):
    m_B, n_L = tile_of_result(M, N, BLOCK_M, SIDE)
    G = tl.cdiv(K, SIDE)
    k_K = tl.arange(0, SIDE)
    a_ptrs = a_ptr + m_B[:, None] * a_stride + k_K[None, :]
    w_ptrs = w_ptr + n_L[None, :] * w_stride + k_K[:, None]
    a_scale_ptrs = a_scale_ptr + m_B * G
    w_scale_ptr += tl.min(n_L, 0) // SIDE * G  # one block for all of the tile
    acc_BL = tl.zeros([BLOCK_M, SIDE], tl.float32)
    for g in range(G):
        k = g * SIDE
        a_BK = tl.load(a_ptrs + k, mask=(m_B < M)[:, None] & (k_K < K - k)[None, :], other=0.0)
        w_KL = tl.load(w_ptrs + k, mask=(n_L < N)[None, :] & (k_K < K - k)[:, None], other=0.0)
        scale_B = widen(tl.load(a_scale_ptrs + g, mask=m_B < M, other=0.0))
        scale_B *= widen(tl.load(w_scale_ptr + g))
        zero_BL = tl.zeros([BLOCK_M, SIDE], tl.float32)
        sum_BL = fp8_dot(a_BK, w_KL, zero_BL, NATIVE, SIDE)
        acc_BL += sum_BL * scale_B[:, None]  # one operation an element: it is not hidden

    out_ptrs = out_ptr + m_B[:, None] * N + n_L[None, :]
    m_BL = (m_B < M)[:, None] & (n_L < N)[None, :]
    tl.store(out_ptrs, narrow(acc_BL, out_ptr.dtype.element_ty), mask=m_BL)


def linear_fp8_block(
    a_MK: Tensor,
    a_scale_MG: Tensor,
    w_NK: Tensor,
    w_scale_HG: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T, [M, N] in `dtype`, of E4M3 codes; scales [M, ceil(K/128)], [ceil(N/128), same].

    Raises ValueError for shapes that do not fit.
    """
    (M, K), N = a_MK.shape, w_NK.shape[0]
    if w_NK.shape[1] != K or not a_MK.stride(1) == w_NK.stride(1) == 1:
        raise ValueError(f"want two dense matrices: {tuple(a_MK.shape)} {tuple(w_NK.shape)}")
    G, H = triton.cdiv(K, SIDE), triton.cdiv(N, SIDE)
    if tuple(a_scale_MG.shape) != (M, G) or tuple(w_scale_HG.shape) != (H, G):
        raise ValueError(f"scales {tuple(a_scale_MG.shape)} {tuple(w_scale_HG.shape)}")
    out_MN = torch.empty(M, N, dtype=dtype, device=a_MK.device)
    rows = min(64, block_m(M))  # of 128, sum and acc would leave too few programs for a processor
    _linear_fp8_block_kernel[(triton.cdiv(M, rows) * H,)](
        *(operand(a_MK), a_scale_MG.contiguous(), operand(w_NK), w_scale_HG.contiguous(), out_MN),
        *(M, N, K, a_MK.stride(0), w_NK.stride(0)),
        NATIVE=has_native_e4m3(a_MK.device),
        BLOCK_M=rows,
        SIDE=SIDE,
        num_warps=4,
        num_stages=3,
    )
    return out_MN
