"""FP8 and INT8 matrix products, a scale per token and per output channel; FP8 also with scales per
128 of a token and per block of 128 x 128.

Meaning: `reference_linear.linear_w8a8`, `.linear_fp8_block`. Codes are multiplied as they are and
sums scaled once at the end, as engines do; of blocks every 128 products are scaled, and added in
fp32. INT8 sums are exact. FP8 products are exact and summed in fp32; Hopper's tensor cores keep
about 14 bits while they sum, so every 128 products are moved to fp32. Without FP8 tensor cores the
codes are widened to bf16, which holds every E4M3 value.

Shape letters: M tokens, K input features, N output channels, G blocks along K, H blocks along N;
B, L the tile of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.rounding import INTERPRETED, e4m3_value, has_native_e4m3, narrow, widen

SIDE = 128
"""Side of a weight block, columns of an activation group, and of a step."""


@triton.jit
def first_of_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a program. Eight tiles down before one across, for the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first_m = pid // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - first_m, 8)
    tile_m = first_m + pid % (8 * tiles_n) % height
    tile_n = pid % (8 * tiles_n) // height
    return tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N


@triton.jit
def _fp8_dot(a_BK, w_KL, acc_BL, NATIVE: tl.constexpr):
    """acc + a @ w of E4M3 codes: FP8 operands if NATIVE, else uint8."""
    if NATIVE:
        return tl.dot(a_BK, w_KL, acc_BL, max_num_imprecise_acc=128)
    elif INTERPRETED:
        return tl.dot(e4m3_value(a_BK), e4m3_value(w_KL), acc_BL, input_precision="ieee")
    else:
        a_BK, w_KL = e4m3_value(a_BK).to(tl.bfloat16), e4m3_value(w_KL).to(tl.bfloat16)
        return tl.dot(a_BK, w_KL, acc_BL)


@triton.jit
def _linear_w8a8_kernel(
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
    a_scale_stride,
    w_scale_stride,
    FP8: tl.constexpr,
    BLOCKS: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIDE: tl.constexpr,
):
    first_m, first_n = first_of_tile(M, N, BLOCK_M, SIDE)
    k_K = tl.arange(0, SIDE)
    m_B, n_L = first_m + tl.arange(0, BLOCK_M), first_n + k_K
    a_ptrs = a_ptr + m_B[:, None] * a_stride + k_K[None, :]
    w_ptrs = w_ptr + n_L[None, :] * w_stride + k_K[:, None]
    a_scale_ptrs = a_scale_ptr + m_B * a_scale_stride
    acc_BL = tl.zeros([BLOCK_M, SIDE], tl.float32 if FP8 else tl.int32)
    for k in range(0, K, SIDE):
        m_BK = (m_B < M)[:, None] & (k_K < K - k)[None, :]
        m_KL = (n_L < N)[None, :] & (k_K < K - k)[:, None]
        # E4M3 zero has code 0, so masked codes of both formats add nothing
        a_BK = tl.load(a_ptrs + k, mask=m_BK, other=0.0)
        w_KL = tl.load(w_ptrs + k, mask=m_KL, other=0.0)
        if BLOCKS:
            g = k // SIDE
            scale_B = widen(tl.load(a_scale_ptrs + g, mask=m_B < M, other=0.0))
            scale_B *= widen(tl.load(w_scale_ptr + first_n // SIDE * w_scale_stride + g))
            zero_BL = tl.zeros([BLOCK_M, SIDE], tl.float32)
            # one operation an element: it is not hidden
            acc_BL += _fp8_dot(a_BK, w_KL, zero_BL, NATIVE) * scale_B[:, None]
        elif FP8:
            acc_BL = _fp8_dot(a_BK, w_KL, acc_BL, NATIVE)
        else:
            acc_BL = tl.dot(a_BK, w_KL, acc_BL, out_dtype=tl.int32)

    out_BL = acc_BL.to(tl.float32)
    if not BLOCKS:
        a_scale_B = tl.load(a_scale_ptrs, mask=m_B < M, other=0.0)
        w_scale_L = tl.load(w_scale_ptr + n_L * w_scale_stride, mask=n_L < N, other=0.0)
        out_BL = out_BL * widen(a_scale_B)[:, None] * widen(w_scale_L)[None, :]
    out_ptrs = out_ptr + m_B[:, None] * N + n_L[None, :]
    m_BL = (m_B < M)[:, None] & (n_L < N)[None, :]
    tl.store(out_ptrs, narrow(out_BL, out_ptr.dtype.element_ty), mask=m_BL)


def _operand(code: Tensor) -> Tensor:
    """Codes as the kernel takes them: FP8 where the device multiplies FP8, else its bytes."""
    if code.dtype == torch.float8_e4m3fn and not has_native_e4m3(code.device):
        return code.view(torch.uint8)
    return code


def _product(
    a_MK: Tensor,
    a_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype,
    scale_strides: tuple[int, int],
    most: int,
    blocks: bool,
) -> Tensor:
    """In tiles of 16 to `most` rows: decoding wants few, a prompt many."""
    (M, K), N = a_MK.shape, w_NK.shape[0]
    out_MN = torch.empty(M, N, dtype=dtype, device=a_MK.device)
    rows = min(most, max(16, triton.next_power_of_2(M)))
    _linear_w8a8_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, SIDE),)](
        *(_operand(a_MK), a_scale.contiguous(), _operand(w_NK), w_scale.contiguous(), out_MN),
        *(M, N, K, a_MK.stride(0), w_NK.stride(0), *scale_strides),
        FP8=a_MK.dtype == torch.float8_e4m3fn,
        BLOCKS=blocks,
        NATIVE=has_native_e4m3(a_MK.device),
        BLOCK_M=rows,
        SIDE=SIDE,
        num_warps=8 if rows == 128 else 4,
        num_stages=3,
    )
    return out_MN


def _check(a_MK: Tensor, w_NK: Tensor) -> None:
    dense = a_MK.stride(1) == w_NK.stride(1) == 1
    if a_MK.dtype != w_NK.dtype or w_NK.shape[1] != a_MK.shape[1] or not dense:
        raise ValueError(f"want two dense matrices of one dtype: {a_MK.shape} {w_NK.shape}")


def linear_w8a8(
    a_MK: Tensor,
    a_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T, [M, N] in `dtype`; both FP8 or both INT8.

    a_scale is [M, 1] (per token) or [1]; w_scale [N, 1] (per output channel) or [1]. Raises
    ValueError for shapes or dtypes that do not fit.
    """
    M, N = len(a_MK), len(w_NK)
    _check(a_MK, w_NK)
    if a_scale.numel() not in (1, M) or w_scale.numel() not in (1, N):
        raise ValueError(f"scales {tuple(a_scale.shape)} {tuple(w_scale.shape)} for {M} x {N}")
    strides = int(a_scale.numel() > 1), int(w_scale.numel() > 1)
    return _product(a_MK, a_scale, w_NK, w_scale, dtype, strides, 128, False)


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
    _check(a_MK, w_NK)
    G, H = triton.cdiv(a_MK.shape[1], SIDE), triton.cdiv(len(w_NK), SIDE)
    if tuple(a_scale_MG.shape) != (len(a_MK), G) or tuple(w_scale_HG.shape) != (H, G):
        raise ValueError(f"scales {tuple(a_scale_MG.shape)} {tuple(w_scale_HG.shape)}")
    # of 128 rows, sum and acc would leave too few programs for a processor
    return _product(a_MK, a_scale_MG, w_NK, w_scale_HG, dtype, (G, G), 64, True)
