"""The doors to the kernels: Triton for CUDA tensors, their meaning in plain torch for others.

The one rule is `on_gpu`. CKPTQ_EAGER=1 takes the meaning on a GPU as well, to find out whether a
wrong result is a kernel's fault. Both give the same bits, but for the order in which the linear
products sum. Arguments are those of the functions of the same name in this package, which have the
documentation; input is finite. Triton is imported by the first call that needs it. The doors of KV
caches are in `dispatch_cache`, that of calibration's attention is `calibration_attention`.
"""

import os

import torch
from torch import Tensor

from ckptq.kernels.reference import int4 as int4_reference
from ckptq.kernels.reference import linear as linear_reference
from ckptq.kernels.reference import quantize as reference
from ckptq.rope_order import Heads, RopeOrder

FP8 = torch.float8_e4m3fn
Scaled = tuple[Tensor, Tensor]
Packed = tuple[Tensor, Tensor, Tensor | None]


def on_gpu(x: Tensor) -> bool:
    """Whether x is quantized by a kernel."""
    return x.is_cuda and os.environ.get("CKPTQ_EAGER") != "1"


def quantize_rows(
    x_RC: Tensor,
    dtype: torch.dtype = FP8,
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> Scaled:
    """Per output channel or per token: codes [R, C], scales [R, 1]."""
    if on_gpu(x_RC):
        from ckptq.kernels.quantize_rows import quantize_rows as fast

        return fast(x_RC, dtype, heads, to)
    return reference.quantize_rows(x_RC, dtype, heads, to)


def quantize_tensor(x_RC: Tensor, dtype: torch.dtype = FP8) -> Scaled:
    """Per tensor: codes [R, C], scale [1]."""
    if on_gpu(x_RC):
        from ckptq.kernels.quantize_tensor import quantize_tensor as fast

        return fast(x_RC, dtype)
    return reference.quantize_tensor(x_RC, dtype)


def quantize_heads(x_THD: Tensor, dtype: torch.dtype = FP8) -> Scaled:
    """Per attention head: codes [T, H, D], scales [H]."""
    if on_gpu(x_THD):
        from ckptq.kernels.quantize_tensor import quantize_heads as fast

        return fast(x_THD, dtype)
    return reference.quantize_heads(x_THD, dtype)


def quantize_blocks(
    x_RC: Tensor,
    dtype: torch.dtype = FP8,
    block: tuple[int, int] = (128, 128),
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> Scaled:
    """Per block: codes [R, C], scales [ceil(R / 128), ceil(C / 128)].

    The kernel takes blocks that a program holds: sides of powers of two, 32768 values at most.
    """
    held = block[0] * block[1] <= 1 << 15 and not any(side & (side - 1) for side in block)
    if on_gpu(x_RC) and held:
        from ckptq.kernels.quantize_blocks import quantize_blocks as fast

        return fast(x_RC, dtype, block, heads, to)
    return reference.quantize_blocks(x_RC, dtype, block, heads, to)


def quantize_static(
    x_RC: Tensor,
    scale_GK: Tensor,
    tile: tuple[int, int],
    dtype: torch.dtype = FP8,
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> Tensor:
    """Codes [R, C] under scales that each cover a tile of rows x columns."""
    if on_gpu(x_RC):
        from ckptq.kernels.quantize_static import quantize_static as fast

        return fast(x_RC, scale_GK, tile, dtype, heads, to)
    return reference.quantize_static(x_RC, scale_GK, tile, dtype, heads, to)


def dequantize(code_RC: Tensor, scale_GK: Tensor, tile: tuple[int, int]) -> Tensor:
    """Values [R, C] in the scale's dtype."""
    if on_gpu(code_RC):
        from ckptq.kernels.dequantize import dequantize as fast

        return fast(code_RC, scale_GK, tile)
    return reference.dequantize(code_RC, scale_GK, tile)


def quantize_experts(x_EKN: Tensor, dtype: torch.dtype = FP8) -> Scaled:
    """Fused experts turned, per output channel: codes [E, N, K], scales [E, N, 1]."""
    if on_gpu(x_EKN):
        from ckptq.kernels.quantize_experts import quantize_experts as fast

        return fast(x_EKN, dtype)
    return reference.quantize_experts(x_EKN, dtype)


def quantize_expert_blocks(x_EKN: Tensor, dtype: torch.dtype = FP8, block: int = 128) -> Scaled:
    """Fused experts turned, per block: codes [E, N, K], scales [E, ceil(N / 128), same of K]."""
    if on_gpu(x_EKN):
        from ckptq.kernels.quantize_expert_blocks import quantize_expert_blocks as fast

        return fast(x_EKN, dtype, block)
    return reference.quantize_expert_blocks(x_EKN, dtype, block)


def quantize_int4(
    x_RC: Tensor,
    group: int | None = 128,
    symmetric: bool = True,
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> Packed:
    """Packed codes [R, C / 8], scales [R, G], packed zero points [R / 8, G] or None."""
    if on_gpu(x_RC):
        from ckptq.kernels.int4 import quantize_int4 as fast

        return fast(x_RC, group, symmetric, heads, to)
    return int4_reference.quantize_int4(x_RC, group, symmetric, heads, to)


def dequantize_int4(
    packed_RP: Tensor, scale_RG: Tensor, columns: int, zero_ZG: Tensor | None = None
) -> Tensor:
    """Values [R, columns] in the scale's dtype."""
    if on_gpu(packed_RP):
        from ckptq.kernels.int4 import dequantize_int4 as fast

        return fast(packed_RP, scale_RG, columns, zero_ZG)
    return int4_reference.dequantize_int4(packed_RP, scale_RG, columns, zero_ZG)


def quantize_int4_experts(x_EKN: Tensor, group: int = 128, symmetric: bool = True) -> Packed:
    """Fused experts turned and packed: [E, N, K / 8], [E, N, G], [E, N / 8, G] or None."""
    if on_gpu(x_EKN):
        from ckptq.kernels.int4_experts import quantize_int4_experts as fast

        return fast(x_EKN, group, symmetric)
    return int4_reference.quantize_int4_experts(x_EKN, group, symmetric)


def linear_w8a8(
    a_MK: Tensor,
    a_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T of FP8 or INT8 codes, a scale per token and output channel, or one for all."""
    if on_gpu(a_MK):
        from ckptq.kernels.linear_w8a8 import linear_w8a8 as fast

        return fast(a_MK, a_scale, w_NK, w_scale, dtype)
    (M, K), N = a_MK.shape, len(w_NK)
    args = a_MK, a_scale.view(-1, 1), w_NK, w_scale.view(-1, 1)
    a_tile, w_tile = (
        (rows if s.numel() == 1 else 1, K) for s, rows in ((a_scale, M), (w_scale, N))
    )
    return linear_reference.linear_w8a8(*args, a_tile, w_tile, dtype)


def linear_fp8_block(
    a_MK: Tensor,
    a_scale_MG: Tensor,
    w_NK: Tensor,
    w_scale_HG: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T of E4M3 codes, activations scaled per 128 of a token, weights per 128 x 128."""
    if on_gpu(a_MK):
        from ckptq.kernels.linear_fp8_block import linear_fp8_block as fast

        return fast(a_MK, a_scale_MG, w_NK, w_scale_HG, dtype)
    args = a_MK, a_scale_MG, w_NK, w_scale_HG
    return linear_reference.linear_w8a8(*args, (1, 128), (128, 128), dtype)


def linear_w4a16(
    a_MK: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_ZG: Tensor | None = None
) -> Tensor:
    """a @ w.T of activations and packed INT4 weights; the kernel takes activations of 16 bits."""
    if on_gpu(a_MK) and a_MK.element_size() == 2:
        from ckptq.kernels.linear_w4a16 import linear_w4a16 as fast

        return fast(a_MK, packed_NP, scale_NG, zero_ZG)
    return linear_reference.linear_w4a16(a_MK, packed_NP, scale_NG, zero_ZG)
