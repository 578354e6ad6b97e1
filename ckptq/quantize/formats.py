"""Weights to their stored tensors, for every format. The door to this package.

Bit for bit what llm-compressor and compressed-tensors write for the same weight, with one choice:
codes are the nearest to weight / scale divided in float32 (as llm-compressor does on GPUs), on
every device. All is local to its rows, so block by block equals the whole when blocks start at
multiples of `row_quantum`. What is one number for a whole weight, or for a set of weights that
inference fuses, comes from `statistic`: take it of every block, merge, and hand it in.

Names are local: "weight" or "weight_packed", "weight_scale", ... Shape letters: R rows, C columns,
P packed columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptq.quantize import scales
from ckptq.quantize.codes import as_numbers
from ckptq.quantize.dequantize import dequantize
from ckptq.quantize.encode import encode
from ckptq.quantize.packing import pack_words
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.search import best_ranges, extreme_of_best
from ckptq.quantize.stored import row_quantum, stored
from ckptq.quantize.tiles import NonFinite, extremes, magnitude, tiled
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import TensorSpec, spec_of, torch_dtype

__all__ = [
    "Grid",
    "NonFinite",
    "Ranges",
    "Scratch",
    "WeightScheme",
    "codes_on",
    "constants",
    "dequantize",
    "grid",
    "merge_statistic",
    "needs_statistic",
    "quantize",
    "row_quantum",
    "scale_tensors",
    "statistic",
    "statistic_of",
    "stored",
]


Ranges = tuple[Tensor, Tensor]
"""Of each tile the lowest number, 0 or less, and the highest, 0 or more, in the weight's dtype."""


def needs_statistic(scheme: WeightScheme) -> bool:
    """Whether one number over the whole weight, or fused set, must be known before any row."""
    return scheme.strategy in ("tensor", "tensor_group")


def statistic(w_RC: Tensor, scheme: WeightScheme, scratch: Scratch | None = None) -> Tensor:
    """[2]: min(amin, 0) and max(amax, 0) of these rows, in their dtype. `NonFinite` on NaN, Inf.

    With a search, the extremes of the ranges that it chooses.
    """
    scratch = scratch or Scratch(w_RC.device)
    if scheme.search is not None:
        return extreme_of_best(tiled(w_RC.contiguous(), scheme), scheme, scheme.search, scratch)
    low_R, high_R = extremes(w_RC.contiguous(), scratch)
    return torch.stack((low_R.amin(), high_R.amax()))


def statistic_of(ranges: Ranges) -> Tensor:
    """The statistic of rows whose tiles have these ranges."""
    return torch.stack((ranges[0].amin(), ranges[1].amax()))


def merge_statistic(a_2: Tensor, b_2: Tensor) -> Tensor:
    """The statistic of both: of more rows of a weight, or of the members of a fused set."""
    return torch.stack((torch.minimum(a_2[0], b_2[0]), torch.maximum(a_2[1], b_2[1])))


def constants(
    weight: TensorSpec, scheme: WeightScheme, statistic: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that belong to no row: the one scale and zero point, global scale, shape."""
    made: dict[str, Tensor] = {}
    if scheme.strategy == "tensor":
        made |= scale_tensors(*_scale_of_tensor(statistic, scheme), scheme)
    if scheme.strategy == "tensor_group":
        made["weight_global_scale"] = _global_scale(statistic, scheme)
    if scheme.format == "pack-quantized":
        made["weight_shape"] = torch.tensor(weight.shape)
    return made


def quantize(
    w_RC: Tensor,
    scheme: WeightScheme,
    statistic: Tensor | None = None,
    scratch: Scratch | None = None,
) -> dict[str, Tensor]:
    """The tensors that belong to these rows; with `constants` they are all that is stored.

    Shapes and dtypes are those of `stored`, and so is the `PlanError` on rows that do not fit.
    `NonFinite` on NaN or Inf, from `statistic` already where the scheme needs one. With `scratch`
    the codes are in its memory: the next call in this thread overwrites them.
    """
    scratch = scratch or Scratch(w_RC.device)
    x = tiled(w_RC.contiguous(), scheme)
    scale, zero_point, divisor = _scale(x, scheme, statistic, scratch)
    code_RP = _codes(w_RC, divisor, zero_point, scheme, scratch)
    if scheme.strategy == "tensor":
        return {scheme.codes: code_RP}
    return {scheme.codes: code_RP} | scale_tensors(scale, zero_point, scheme)


@dataclass(frozen=True, slots=True)
class Grid:
    """What a weight's codes may stand for: (code - zero point) * divisor, with one of each a tile.

    Tiles are groups [R, G], blocks [M, N], rows [R, 1] or the whole [1].
    """

    stored: Mapping[str, Tensor]
    """Scales and zero points as they are stored, without what `constants` makes."""
    scale: Tensor
    """As a number: float8 and exponents in float32."""
    zero_point: Tensor | None
    divisor: Tensor
    """The scale, divided by the global scale where there is one."""
    global_scale: Tensor | None


def grid(
    w_RC: Tensor,
    scheme: WeightScheme,
    statistic: Tensor | None = None,
    ranges: Ranges | None = None,
) -> Grid:
    """The grid on which `quantize` rounds a whole weight, for who chooses codes otherwise.

    `ranges` are what each tile's codes have to reach, in place of what the scheme says.
    """
    stored(spec_of(w_RC), scheme)
    scratch = Scratch(w_RC.device)
    x = tiled(w_RC.contiguous(), scheme)
    scale, zero_point, divisor = _scale(x, scheme, statistic, scratch, ranges)
    kept = {} if scheme.strategy == "tensor" else scale_tensors(scale, zero_point, scheme)
    number = {None: scale, "uint8": divisor}.get(scheme.scale_dtype, scale.float())
    whole = _global_scale(statistic, scheme) if scheme.strategy == "tensor_group" else None
    return Grid(kept, number, zero_point, divisor, whole)


def codes_on(w_RC: Tensor, on: Grid, scheme: WeightScheme) -> Tensor:
    """The stored codes of weights that lie on a grid, or those nearest to them."""
    return _codes(w_RC, on.divisor, on.zero_point, scheme, Scratch(w_RC.device))


def _codes(
    w_RC: Tensor,
    divisor: Tensor,
    zero_point: Tensor | None,
    scheme: WeightScheme,
    scratch: Scratch,
) -> Tensor:
    code = stored(spec_of(w_RC), scheme)[scheme.codes]
    code_RP = scratch.tensor("stored", code.shape, torch_dtype(code.dtype))
    encode(tiled(w_RC.contiguous(), scheme), divisor, zero_point, scheme, scratch, code_RP)
    return code_RP


def _scale(
    x: Tensor,
    scheme: WeightScheme,
    statistic: Tensor | None,
    scratch: Scratch,
    ranges: Ranges | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of each tile: the scale as it is stored, the zero point, and what weights are divided by."""
    if scheme.strategy == "tensor":
        scale, zero_point = _scale_of_tensor(statistic, scheme)
        return scale, zero_point, scale
    if not scheme.symmetric:
        low, high = ranges or _ranges(x, scheme, scratch)
        scale, zero_point = scales.asymmetric(low, high, scheme.num_bits)
        return scale, zero_point, scale
    amax = torch.maximum(-ranges[0], ranges[1]) if ranges else tile_amax(x, scheme, scratch)
    if scheme.strategy == "tensor_group":
        global_scale = _global_scale(statistic, scheme)
        scale = scales.nvfp4(amax, global_scale)
        wide = torch.promote_types(x.dtype, torch.float32)
        return scale, None, as_numbers(scale, wide) / global_scale
    if scheme.scale_dtype == "uint8":
        scale = scales.mx_exponent(amax, scheme.num_bits)
        return scale, None, scales.mx_scale(scale)
    scale = scales.symmetric(amax, scheme.half_range)
    return scale, None, scale


def tile_amax(x: Tensor, scheme: WeightScheme, scratch: Scratch) -> Tensor:
    """The magnitude that a symmetric scale maps to the largest code, of each tile in its dtype."""
    if scheme.search is None:
        return magnitude(x, scratch)
    low, high = _ranges(x, scheme, scratch)
    return torch.maximum(-low, high)


def _ranges(x: Tensor, scheme: WeightScheme, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """What each tile's codes have to reach: its extremes or what a search chooses, and 0."""
    if scheme.search is None:
        return extremes(x, scratch)
    low, high = best_ranges(x, scheme, scheme.search, scratch)
    return low.clamp(max=0), high.clamp(min=0)


def _scale_of_tensor(
    statistic: Tensor | None, scheme: WeightScheme
) -> tuple[Tensor, Tensor | None]:
    assert statistic is not None, f"{scheme} needs the statistic of the whole weight"
    low, high = statistic.split(1)
    if scheme.symmetric:
        return scales.symmetric(torch.maximum(-low, high), scheme.half_range), None
    return scales.asymmetric(low, high, scheme.num_bits)


def _global_scale(statistic: Tensor | None, scheme: WeightScheme) -> Tensor:
    assert statistic is not None, f"{scheme} needs the statistic of the whole weight"
    return scales.nvfp4_global(statistic.abs().amax())


def scale_tensors(
    scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme
) -> dict[str, Tensor]:
    """Scales and zero points of rows, groups or blocks as they are stored."""
    if zero_point is None:
        return {"weight_scale": scale}
    if scheme.format == "pack-quantized":
        # a word holds the zero points of consecutive rows, where the codes' hold columns
        word_GR = pack_words(zero_point.t().contiguous(), scheme.num_bits)
        zero_point = word_GR.t().clone(memory_format=torch.contiguous_format)
    return {"weight_scale": scale, "weight_zero_point": zero_point}
