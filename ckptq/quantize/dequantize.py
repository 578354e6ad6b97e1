"""Stored tensors back to the weight that they stand for, as inference will see it.

Names are local, as in `formats`. Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ckptq.quantize.codes import as_numbers, decode_e2m1
from ckptq.quantize.packing import unpack_words
from ckptq.quantize.scales import FLOATS, mx_scale
from ckptq.quantize.scratch import block_length
from ckptq.quantize.stored import quantum_specs, row_quantum, stored_span
from ckptq.quantize.tiles import over_tiles, tiled, untiled
from ckptq.quantize.weight_scheme import WeightScheme

Parts = Mapping[str, Tensor]
"""Tensors by local name, of a weight or of some of its rows."""

EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
"""Dtypes of scales that are powers of two, and store the exponent plus 127."""


def dequantize(
    tensors: Parts,
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
    parts = {**tensors, "weight_scale": scale}
    R, C = len(tensors[scheme.codes]), _columns(tensors, scheme, shape)
    if scheme.block_structure and C % scheme.block_structure[1] == 0:
        parts["weight_scale"], scheme = _by_row(scale, scheme, R)
    made_RC = torch.empty((R, C), dtype=dtype or scale.dtype, device=scale.device)
    quantum = row_quantum(scheme)
    step = max(block_length(made_RC) // quantum, 1) * quantum
    for start in range(0, R, step):
        span = start, min(start + step, R)
        made_RC[slice(*span)] = _values(_rows(parts, scheme, C, span), scheme, C)
    return made_RC


def _by_row(scale_MN: Tensor, scheme: WeightScheme, rows: int) -> tuple[Tensor, WeightScheme]:
    """Blocks as groups, with the scales of each row, so that rows can be cut anywhere."""
    assert scheme.block_structure is not None
    height, width = scheme.block_structure
    groups = replace(scheme, strategy="group", group_size=width, block_structure=None)
    return scale_MN.repeat_interleave(height, 0)[:rows], groups


def _rows(parts: Parts, scheme: WeightScheme, columns: int, span: tuple[int, int]) -> Parts:
    """The parts of some rows of the weight."""
    specs = quantum_specs(scheme, columns)
    have = [n for n, spec in specs.items() if len(spec.shape) > 1 and len(parts[n]) > 1]
    cut = {n: parts[n][slice(*stored_span(n, scheme, columns, *span))] for n in have}
    return {**parts, **cut}


def _values(parts: Parts, scheme: WeightScheme, columns: int) -> Tensor:
    """[R, C] in the dtype of the scales, which are numbers."""
    scale = parts["weight_scale"]
    code_RC = as_numbers(_codes(parts, scheme, columns), scale.dtype)
    if "weight_g_idx" in parts:
        return _reordered(code_RC, parts, scheme)
    x = tiled(code_RC, scheme)
    if not scheme.symmetric:
        zero_point = _zero_point(parts, scheme, len(code_RC))
        x.sub_(over_tiles(zero_point.to(scale.dtype), x))
    return untiled(x.mul_(over_tiles(scale, x)), code_RC.shape)


def _reordered(code_RC: Tensor, parts: Parts, scheme: WeightScheme) -> Tensor:
    """Groups in activation order: each column has the scale of the group that it names."""
    scale_RG, index_C = parts["weight_scale"], parts["weight_g_idx"].long()
    if not scheme.symmetric:
        zero_RG = _zero_point(parts, scheme, len(code_RC)).to(scale_RG.dtype)
        code_RC.sub_(zero_RG[:, index_C])
    return code_RC.mul_(scale_RG[:, index_C])


def _scale(tensors: Parts, scheme: WeightScheme) -> Tensor:
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


def _columns(tensors: Parts, scheme: WeightScheme, shape: tuple[int, ...] | None) -> int:
    codes = tensors[scheme.codes].shape[1]
    if scheme.codes == "weight":
        return codes
    if scheme.type == "float":
        return 2 * codes
    return int(shape[1] if shape else tensors["weight_shape"][1])


def _codes(parts: Parts, scheme: WeightScheme, columns: int) -> Tensor:
    if scheme.codes == "weight":
        return parts["weight"]
    packed = parts["weight_packed"]
    if scheme.type == "float":
        return decode_e2m1(packed)
    return unpack_words(packed, scheme.num_bits, columns)


def _zero_point(tensors: Parts, scheme: WeightScheme, rows: int) -> Tensor:
    zero_point = tensors["weight_zero_point"]
    if scheme.codes == "weight":
        return zero_point
    return unpack_words(zero_point.t(), scheme.num_bits, rows).t()
