"""Products of many tokens by libraries, where those are faster than the kernels beside them.

cuBLAS multiplies E4M3 codes under scales of blocks itself on Hopper (torch's `scaled_mm`); packed
INT4 weights are decoded once and multiplied in 16 bits, which costs one pass over the weight and
pays from `MANY` tokens on. Meaning: that of the kernels, which serve few tokens and other devices.

Shape letters: M tokens, K input features, N output channels, G blocks along K, H blocks along N.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ckptq.kernels.int4.quantize_int4 import dequantize_int4
from ckptq.kernels.linear import linear_w4a16 as words
from ckptq.kernels.linear import linear_w8a8 as bytes_
from ckptq.kernels.linear.linear_w8a8 import SIDE

MANY = 1024
"""Tokens. On an H200, 28672 x 8192: at 512 both are as fast."""


@cache
def _has_block_products(device: torch.device) -> bool:
    """cuBLAS has them since CUDA 12.9, on Hopper alone."""
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if device.type != "cuda":
        return False
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and version >= (12, 9) and hasattr(functional, "scaled_mm")


def multiplies_blocks(a_MK: Tensor, w_NK: Tensor, dtype: torch.dtype) -> bool:
    """Whether cuBLAS takes these codes and pays."""
    (M, K), N = a_MK.shape, len(w_NK)
    whole = K % (4 * SIDE) == 0 and N % SIDE == 0 and M % 4 == 0  # cuBLAS wants scales by fours
    dense = a_MK.is_contiguous() and w_NK.is_contiguous()
    fits = whole and dense and dtype == torch.bfloat16
    return fits and M >= MANY and _has_block_products(a_MK.device)


def linear_fp8_block(
    a_MK: Tensor,
    a_scale_MG: Tensor,
    w_NK: Tensor,
    w_scale_HG: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The kernel's product, by cuBLAS where `multiplies_blocks` says so."""
    if not multiplies_blocks(a_MK, w_NK, dtype):
        return bytes_.linear_fp8_block(a_MK, a_scale_MG, w_NK, w_scale_HG, dtype)
    from torch.nn.functional import ScalingType

    a_scale = a_scale_MG.float().t().contiguous().t()  # cuBLAS wants tokens to be neighbours
    return functional.scaled_mm(
        a_MK,
        w_NK.t(),
        a_scale,
        ScalingType.BlockWise1x128,
        w_scale_HG.float().contiguous().t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def linear_w4a16(
    a_MK: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_ZG: Tensor | None = None
) -> Tensor:
    """The kernel's product; of many tokens with weights decoded first."""
    if len(a_MK) < MANY:
        return words.linear_w4a16(a_MK, packed_NP, scale_NG, zero_ZG)
    w_NK = dequantize_int4(packed_NP, scale_NG, a_MK.shape[1], zero_ZG)
    return functional.linear(a_MK, w_NK.to(a_MK.dtype))
