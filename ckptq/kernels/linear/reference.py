"""What the quantized matrix products mean: dequantize, then multiply in float64.

Shape letters: M tokens, K input features, N output channels, G groups along K, P = K / 8 packed
columns, Z = N / 8 packed rows.
"""

import torch
from torch import Tensor

from ckptq.kernels.int4.reference import dequantize_int4
from ckptq.kernels.quantize.reference import spread


def linear_w8a8(
    a_MK: Tensor,
    a_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    a_tile: tuple[int, int],
    w_tile: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T of FP8 or INT8 codes, [M, N]; each scale covers a tile of its matrix."""
    a = a_MK.double() * spread(a_scale, a_tile, *a_MK.shape).double()
    w = w_NK.double() * spread(w_scale, w_tile, *w_NK.shape).double()
    return (a @ w.t()).to(dtype)


def linear_w4a16(
    a_MK: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_ZG: Tensor | None = None
) -> Tensor:
    """a @ dequantized.T in a's dtype, [M, N]; weights are rounded to the scale's dtype first."""
    w_NK = dequantize_int4(packed_NP, scale_NG, a_MK.shape[1], zero_ZG)
    return (a_MK.double() @ w_NK.double().t()).to(a_MK.dtype)
