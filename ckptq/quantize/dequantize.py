"""Stored tensors back to the weight that they stand for, as inference will see it.

Names are local, as in `formats`. Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ckptq.quantize.codes import as_numbers, decode_e2m1
from ckptq.quantize.packing import unpack_nibbles, unpack_words
from ckptq.quantize.scales import FLOATS, mx_scale
from ckptq.quantize.tiles import over_tiles, tiled, untiled
from ckptq.quantize.weight_scheme import WeightScheme

EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
"""Dtypes of scales that are powers of two, and store the exponent plus 127."""


def dequantize(
    tensors: Mapping[str, Tensor],
    scheme: WeightScheme,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(code - zero point) * scale: the weight [R, C], or the rows of it that are given.

    In the dtype of the scales, or float32 where that is not one for weights (exponents, NVFP4);
    rounded to `dtype` if one is given. The columns of packed integers come from `shape`, else from
    "weight_shape". "weight_g_idx" [C] is the group of each column, where groups are in activation
    order; "weight_scale_2" is ModelOpt's, by which NVFP4's scales are multiplied. `TypeError` for
    scales of a dtype that is neither a float nor an exponent.
    """
    scale = _scale(tensors, scheme)
    code_RC = as_numbers(_codes(tensors, scheme, shape), scale.dtype)
    if "weight_g_idx" in tensors:
        return _reordered(code_RC, scale, tensors, scheme).to(dtype or scale.dtype)
    x = tiled(code_RC, scheme)
    if not scheme.symmetric:
        zero_point = _zero_point(tensors, scheme, code_RC.shape[0])
        x = x - over_tiles(zero_point.to(scale.dtype), x)
    w_RC = untiled(x * over_tiles(scale, x), code_RC.shape)
    return w_RC.to(dtype or scale.dtype).contiguous()


def _reordered(
    code_RC: Tensor, scale_RG: Tensor, tensors: Mapping[str, Tensor], scheme: WeightScheme
) -> Tensor:
    """Groups in activation order: each column has the scale of the group that it names."""
    index_C = tensors["weight_g_idx"].long()
    if not scheme.symmetric:
        zero_RG = _zero_point(tensors, scheme, code_RC.shape[0]).to(scale_RG.dtype)
        code_RC = code_RC - zero_RG[:, index_C]
    return code_RC * scale_RG[:, index_C]


def _scale(tensors: Mapping[str, Tensor], scheme: WeightScheme) -> Tensor:
    scale = tensors["weight_scale"]
    if scheme.strategy == "tensor_group" and "weight_scale_2" in tensors:
        return scale.float() * tensors["weight_scale_2"]
    if scheme.strategy == "tensor_group":
        return scale.float() / tensors["weight_global_scale"]
    if scale.dtype in EXPONENTS:
        return mx_scale(scale.view(torch.uint8))
    if scale.dtype not in FLOATS:
        raise TypeError(f"a scale in {scale.dtype} is no number to multiply with")
    return scale


def _codes(
    tensors: Mapping[str, Tensor], scheme: WeightScheme, shape: tuple[int, ...] | None
) -> Tensor:
    if scheme.codes == "weight":
        return tensors["weight"]
    packed = tensors["weight_packed"]
    if scheme.type == "float":
        return decode_e2m1(unpack_nibbles(packed))
    columns = int(shape[1] if shape else tensors["weight_shape"][1])
    return unpack_words(packed, scheme.num_bits, columns)


def _zero_point(tensors: Mapping[str, Tensor], scheme: WeightScheme, rows: int) -> Tensor:
    zero_point = tensors["weight_zero_point"]
    if scheme.codes == "weight":
        return zero_point
    return unpack_words(zero_point.t(), scheme.num_bits, rows).t()
