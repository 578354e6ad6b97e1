"""The doors to quantized products: Triton for CUDA tensors (`gpu.on_gpu`), a library for many
tokens of some formats, plain torch for other devices.

All give the same but for the order in which they sum. Arguments are those of the functions of the
same name in this folder, which have the documentation. Triton is imported by the first call that
needs it.
"""

import torch
from torch import Tensor

from ckptq.kernels.gpu import on_gpu
from ckptq.kernels.linear import reference


def linear_w8a8(
    a_MK: Tensor,
    a_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T of FP8 or INT8 codes, a scale per token and output channel, or one for all."""
    if on_gpu(a_MK):
        from ckptq.kernels.linear.linear_w8a8 import linear_w8a8 as fast

        return fast(a_MK, a_scale, w_NK, w_scale, dtype)
    (M, K), N = a_MK.shape, len(w_NK)
    args = a_MK, a_scale.view(-1, 1), w_NK, w_scale.view(-1, 1)
    a_tile, w_tile = (
        (rows if s.numel() == 1 else 1, K) for s, rows in ((a_scale, M), (w_scale, N))
    )
    return reference.linear_w8a8(*args, a_tile, w_tile, dtype)


def linear_fp8_block(
    a_MK: Tensor,
    a_scale_MG: Tensor,
    w_NK: Tensor,
    w_scale_HG: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T of E4M3 codes, activations scaled per 128 of a token, weights per 128 x 128."""
    if on_gpu(a_MK):
        from ckptq.kernels.linear import library
        from ckptq.kernels.linear.linear_fp8_block import linear_fp8_block as fast

        if library.multiplies_blocks(a_MK, w_NK, dtype):
            return library.linear_fp8_block(a_MK, a_scale_MG, w_NK, w_scale_HG)

        return fast(a_MK, a_scale_MG, w_NK, w_scale_HG, dtype)
    args = a_MK, a_scale_MG, w_NK, w_scale_HG
    return reference.linear_w8a8(*args, (1, 128), (128, 128), dtype)


def linear_w4a16(
    a_MK: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_ZG: Tensor | None = None
) -> Tensor:
    """a @ w.T of activations and packed INT4 weights; the kernel takes activations of 16 bits."""
    if on_gpu(a_MK) and a_MK.element_size() == 2:
        from ckptq.kernels.linear import library
        from ckptq.kernels.linear.linear_w4a16 import linear_w4a16 as fast

        if len(a_MK) >= library.MANY:
            return library.linear_w4a16(a_MK, packed_NP, scale_NG, zero_ZG)
        return fast(a_MK, packed_NP, scale_NG, zero_ZG)
    return reference.linear_w4a16(a_MK, packed_NP, scale_NG, zero_ZG)
