"""Matrix product of 16-bit activations with packed INT4 weights, unpacked on the way.

Meaning: `reference.linear.linear_w4a16`. A weight is (code - zero point) * scale rounded to the
scale's dtype, as `dequantize_int4` gives it; then an ordinary product, summed in fp32.

Shape letters: M tokens, K input features, N output channels, G groups along K, P = K / 8 words,
Z = N / 8 words of zero points; B, L the tile of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.linear_w8a8 import block_m, tile_of_result
from ckptq.kernels.rounding import INTERPRETED, narrow, widen


@triton.jit
def _linear_w4a16_kernel(
    a_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    M,
    N,
    K,
    P,
    G,
    group,
    a_stride,
    ASYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m_B, n_L = tile_of_result(M, N, BLOCK_M, BLOCK_N)
    m_L = n_L < N
    stored: tl.constexpr = scale_ptr.dtype.element_ty
    shift_8 = 4 * tl.arange(0, 8)
    word_P = tl.arange(0, BLOCK_K // 8)
    acc_BL = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + m_B[:, None] * a_stride + k_K[None, :]
        a_BK = tl.load(a_ptrs, mask=(m_B < M)[:, None] & (k_K < K)[None, :], other=0.0)
        word_ptrs = packed_ptr + n_L[:, None] * P + (k // 8 + word_P)[None, :]
        m_LP = m_L[:, None] & (k // 8 + word_P < P)[None, :]
        word_LP = tl.load(word_ptrs, mask=m_LP, other=0)
        # columns past the end unpack to something, and meet zeros of `a`
        code_LK = tl.reshape((word_LP[:, :, None] >> shift_8) & 15, (BLOCK_N, BLOCK_K))
        g = k // group  # a block lies in one group
        scale_L = tl.load(scale_ptr + n_L * G + g, mask=m_L, other=0.0)
        offset_L = tl.full([BLOCK_N], 8, tl.int32)
        if ASYMMETRIC:
            zero_L = tl.load(zero_ptr + n_L // 8 * G + g, mask=m_L, other=0)
            offset_L = (zero_L >> (n_L % 8 * 4).to(tl.int32)) & 15
        value_LK = (code_LK - offset_L[:, None]).to(tl.float32) * widen(scale_L)[:, None]
        w_KL = tl.trans(narrow(value_LK, stored))
        if INTERPRETED:
            acc_BL = tl.dot(widen(a_BK), widen(w_KL), acc_BL, input_precision="ieee")
        else:
            acc_BL = tl.dot(a_BK, w_KL, acc_BL, input_precision="ieee")

    out_ptrs = out_ptr + m_B[:, None] * N + n_L[None, :]
    m_BL = (m_B < M)[:, None] & m_L[None, :]
    tl.store(out_ptrs, narrow(acc_BL, out_ptr.dtype.element_ty), mask=m_BL)


def linear_w4a16(
    a_MK: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_ZG: Tensor | None = None
) -> Tensor:
    """a @ w.T in a's dtype, [M, N]; scales are of a's dtype, groups of 32 times n or whole rows."""
    (M, K), (N, P), G = a_MK.shape, packed_NP.shape, scale_NG.shape[1]
    group = K // G
    if K % G or triton.cdiv(K, 8) != P or (group % 32 and G > 1) or a_MK.stride(1) != 1:
        raise ValueError(f"{tuple(a_MK.shape)} does not fit {P} words and {G} groups a row")
    if scale_NG.dtype != a_MK.dtype:
        raise ValueError(f"want scales in {a_MK.dtype}, got {scale_NG.dtype}")
    out_MN = torch.empty(M, N, dtype=a_MK.dtype, device=a_MK.device)
    # unpacking a tile costs as much as 50 rows of products, so a prompt takes as many as fit
    rows = min(128 if a_MK.element_size() == 2 else 64, block_m(M))
    columns = 128 if a_MK.element_size() == 2 else 64
    _linear_w4a16_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, columns),)](
        *(a_MK, packed_NP.contiguous(), scale_NG.contiguous(), zero_ZG, out_MN),
        *(M, N, K, P, G, group, a_MK.stride(0)),
        ASYMMETRIC=zero_ZG is not None,
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=64 if G == 1 else min(64, group & -group),
        num_warps=4,
        num_stages=3 if rows > 64 else 4,
        enable_fp_fusion=False,
    )
    return out_MN
