"""A grid with other scales: those nearest to given ones that can be stored, or given ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ckptq.quantize.formats import Grid, scale_tensors
from ckptq.quantize.scales import E4M3_MAX, mx_scale
from ckptq.quantize.weight_scheme import WeightScheme


def grid_of(
    scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, scheme: WeightScheme
) -> Grid:
    """The grid with these scales and zero points, in the dtypes that they are stored in."""
    kept = scale_tensors(scale, zero_point, scheme)
    if scheme.scale_dtype == "uint8":
        number = mx_scale(scale)
        return Grid(kept, number, None, number, None)
    if global_scale is not None:
        return Grid(kept, scale.float(), None, scale.float() / global_scale, global_scale)
    return Grid(kept, scale, zero_point, scale, None)


def storable(divisor: Tensor, on: Grid) -> Tensor:
    """What a grid's weights can be divided by, nearest to `divisor`, in float32.

    It may be 0 or Inf, with which no weight can be stored.
    """
    return _divided_by(_stored(divisor, on), on).float()


def with_divisors(on: Grid, divisor: Tensor) -> Grid:
    """The grid with these `storable` divisors; zero points and the global scale stay."""
    scale = _stored(divisor, on)
    number = scale if on.global_scale is None else scale.float()
    kept = {**on.stored, "weight_scale": scale}
    return replace(on, stored=kept, scale=number, divisor=_divided_by(scale, on))


def _stored(divisor: Tensor, on: Grid) -> Tensor:
    if on.global_scale is None:
        return divisor.to(on.divisor.dtype)
    return (divisor * on.global_scale).clamp(0, E4M3_MAX).to(torch.float8_e4m3fn)


def _divided_by(scale: Tensor, on: Grid) -> Tensor:
    return scale if on.global_scale is None else scale.float() / on.global_scale
