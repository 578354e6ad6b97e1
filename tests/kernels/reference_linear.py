"""What the quantized matrix products mean: dequantize, then multiply in float64.

Shape letters: M tokens, K input features, N output channels, G groups along K, P = K / 8 packed
columns, Z = N / 8 packed rows.
"""

import torch
from reference_int4 import dequantize_int4
from reference_quantize import spread
from torch import Tensor


def linear_w8a8(
    a_MK: Tensor,
    a_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T of FP8 or INT8 codes, [M, N]; scales are one a row of each matrix, or one for all."""
    a, w = (
        a_MK.double() * a_scale.double().view(-1, 1),
        w_NK.double() * w_scale.double().view(-1, 1),
    )
    return (a @ w.t()).to(dtype)


def linear_fp8_block(
    a_MK: Tensor,
    a_scale_MG: Tensor,
    w_NK: Tensor,
    w_scale_HG: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a @ w.T of E4M3 codes, [M, N]; scales per 128 of a token, and per 128 x 128 of the weight."""
    a = a_MK.double() * spread(a_scale_MG, (1, 128), *a_MK.shape).double()
    w = w_NK.double() * spread(w_scale_HG, (128, 128), *w_NK.shape).double()
    return (a @ w.t()).to(dtype)


def linear_w4a16(
    a_MK: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_ZG: Tensor | None = None
) -> Tensor:
    """a @ dequantized.T in a's dtype, [M, N]; weights are rounded to the scale's dtype first."""
    w_NK = dequantize_int4(packed_NP, scale_NG, a_MK.shape[1], zero_ZG)
    return (a_MK.double() @ w_NK.double().t()).to(a_MK.dtype)
