"""How far weights end from themselves when they are quantized: what a search of ranges adds up.

Every operation is rounded to the dtype of the weight, in llm-compressor's order, because the range
that wins depends on it.

Shape letters: T tiles, L weights of a tile.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ckptq.quantize.codes import round_to_numbers
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
    round_to_numbers(q, zero_point_T1, scheme, scratch)
    q.mul_(scale_T1).sub_(x_TL).abs_()
    return _power(q, norm, scratch)


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
