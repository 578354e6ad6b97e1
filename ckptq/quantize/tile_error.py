"""How far weights end from themselves when they are quantized: what a search of ranges adds up.

Every operation is rounded to the dtype of the weight, in llm-compressor's order, because the range
that wins depends on it.

Shape letters: T tiles, L weights of a tile.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ckptq.quantize import scales
from ckptq.quantize.codes import round_to_e2m1
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.weight_scheme import WeightScheme


def powered_errors(
    x_TL: Tensor,
    scale_T1: Tensor,
    zero_point_T1: Tensor | None,
    scheme: WeightScheme,
    norm: float,
    scratch: Scratch,
) -> Tensor:
    """[T, L]: |dequantized - x|^norm of each weight; overwritten by the next call."""
    held = scratch.tensor("searched", x_TL.shape, x_TL.dtype)
    q = torch.div(x_TL, scale_T1, out=held)
    if zero_point_T1 is not None:
        q.add_(zero_point_T1.to(q.dtype))
    _round(q, scheme, scratch)
    if zero_point_T1 is not None:
        q.sub_(zero_point_T1.to(q.dtype))
    q.mul_(scale_T1).sub_(x_TL).abs_()
    return _power(q, norm, scratch)


def _round(q: Tensor, scheme: WeightScheme, scratch: Scratch) -> None:
    """To the nearest number that a code stands for, in place; ties to even."""
    if scheme.type == "int":
        q.clamp_(-(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1).round_()
    elif scheme.num_bits == 8:
        q.clamp_(-scales.E4M3_MAX, scales.E4M3_MAX).copy_(q.to(torch.float8_e4m3fn))
    else:
        round_to_e2m1(q, scratch.tensor("step", q.shape, q.dtype))


def _power(q: Tensor, norm: float, scratch: Scratch) -> Tensor:
    """q ** norm for q >= 0, in place where it can be; dtypes of 16 bits look it up, as their
    numbers are few and torch's pow takes longer than all else."""
    if q.itemsize != 2 or q.device.type != "cpu":
        return q.pow_(norm)
    index = scratch.tensor("power", (q.numel(),), torch.int32)
    index.copy_(q.view(torch.int16).flatten())
    powers = scratch.tensor("powers", (q.numel(),), q.dtype)
    return torch.index_select(_powers(q.dtype, norm), 0, index, out=powers).view(q.shape)


@cache
def _powers(dtype: torch.dtype, norm: float) -> Tensor:
    """Of every number that is not negative, by its bits."""
    return torch.arange(1 << 15, dtype=torch.int16).view(dtype).pow(norm)
