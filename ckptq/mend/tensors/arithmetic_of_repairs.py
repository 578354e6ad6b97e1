"""Tensors that are computed from stored ones, without a source.

Shape letters: R rows, C columns, G groups, H heads, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_LEAST = 2.0**-9


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale in its dtype, from float32."""
    return (1 / scale.float()).to(scale.dtype)


def transposed(x_RC: Tensor) -> Tensor:
    """[C, R], bytes of any dtype."""
    if x_RC.element_size() > 1:
        return x_RC.t().contiguous()
    return x_RC.view(torch.uint8).t().contiguous().view(x_RC.dtype)


def e4m3_of_e5m2(codes_RC: Tensor) -> Tensor:
    """The same values; those beyond 448 saturate, those below 2^-9 round."""
    return codes_RC.float().clamp(-448, 448).to(torch.float8_e4m3fn)


def signed_codes(codes_RC: Tensor) -> Tensor:
    """Codes stored 128 higher as bytes, as int8."""
    return (codes_RC ^ 128).view(torch.int8)


def largest(scale_H: Tensor) -> Tensor:
    """[1]: one scale that clips no head."""
    return scale_H.reshape(-1).amax(0, keepdim=True)


def most_of(*scales_1: Tensor) -> Tensor:
    """The largest of several single scales, in the shape of the first."""
    first = scales_1[0]
    return (
        torch.stack([s.reshape(()).float() for s in scales_1])
        .amax()
        .to(first.dtype)
        .reshape(first.shape)
    )


def least_of(*scales_1: Tensor) -> Tensor:
    """The smallest of several single scales, in the shape of the first."""
    first = scales_1[0]
    return (
        torch.stack([s.reshape(()).float() for s in scales_1])
        .amin()
        .to(first.dtype)
        .reshape(first.shape)
    )


def shared_group_scales(scale_RG: Tensor, own_1: Tensor, *all_1: Tensor) -> Tensor:
    """E4M3 group scales for the smallest of all global scales in the place of their own.

    compressed-tensors divides group scales by the global one, so that each takes the ratio; at most
    1, so that none overflows.
    """
    ratio = float(least_of(*all_1)) / float(own_1)
    return (scale_RG.float() * ratio).to(scale_RG.dtype)


def rounding_error(scale_RG: Tensor, own_1: Tensor, *all_1: Tensor) -> Tensor:
    """[]: root mean square of the relative error of rounding group scales, zeros left out."""
    ratio = float(least_of(*all_1)) / float(own_1)
    wanted = scale_RG.float() * ratio
    found = shared_group_scales(scale_RG, own_1, *all_1).float()
    there = wanted > 0
    return ((found - wanted) / wanted)[there].square().mean().sqrt().nan_to_num()


def shape_of(rows: int, columns: int) -> Tensor:
    """`weight_shape` [2] of a packed weight."""
    return torch.tensor([rows, columns], dtype=torch.int64)


def zero_points_along_rows(packed_RW: Tensor, groups: int, bits: int) -> Tensor:
    """Zero points packed along the rows, [W', G], of ones packed along the columns, [R, W]."""
    per_word = 32 // bits
    shift = torch.arange(per_word, dtype=torch.int32) * bits
    codes_RG = ((packed_RW[..., None] >> shift) & (1 << bits) - 1).flatten(1)[:, :groups]
    rows = torch.nn.functional.pad(codes_RG, (0, 0, 0, -len(codes_RG) % per_word))
    words = rows.unflatten(0, (-1, per_word)) << shift[None, :, None]
    return words.sum(1, dtype=torch.int32)
