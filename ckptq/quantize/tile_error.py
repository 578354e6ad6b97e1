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
    q = errors(x_TL, scale_T1, zero_point_T1, scheme, scratch)
    if q.itemsize != 2:
        return q.pow_(norm)
    index = scratch.tensor("power", (q.numel(),), torch.int32)
    index.copy_(q.view(torch.int16).flatten())
    held = scratch.tensor("powers", (q.numel(),), q.dtype)
    return torch.index_select(powers(q.dtype, norm, q.device), 0, index, out=held).view(q.shape)


def errors(
    x_TL: Tensor,
    scale_T1: Tensor,
    zero_point_T1: Tensor | None,
    scheme: WeightScheme,
    scratch: Scratch,
) -> Tensor:
    """[T, L]: |dequantized - x| of each weight, the same bits on every device; overwritten by the
    next call."""
    held = scratch.tensor("searched", x_TL.shape, x_TL.dtype)
    q = torch.div(x_TL, scale_T1, out=held)
    round_to_numbers(q, zero_point_T1, scheme, scratch)
    return q.mul_(scale_T1).sub_(x_TL).abs_()


@cache
def powers(dtype: torch.dtype, norm: float, device: torch.device) -> Tensor:
    """Of every number of 16 bits that is not negative, by its bits, as a CPU finds them. They are
    few, and torch's pow takes longer than all else."""
    return torch.arange(1 << 15, dtype=torch.int16).view(dtype).pow(norm).to(device)
