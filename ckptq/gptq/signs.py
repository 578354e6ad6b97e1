"""Scales with a sign: integer codes reach one step further below zero than above it.

A symmetric code of 4 bits goes from -8 to 7. With a negative scale the longer side lies above zero,
so the sign can be that of each group's largest weight, which then is -8 and needs no room of its
own: scales are an eighth of it instead of the 7.5th part that llm-compressor takes. Engines
multiply by the scale as it is; AutoRound's checkpoints hold such scales too.

Shape letters: R rows, C columns, G groups of a row, L columns of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ckptq.quantize.codes import round_to_numbers
from ckptq.quantize.formats import Grid, Scratch
from ckptq.quantize.regrid import storable, with_divisors
from ckptq.quantize.weight_scheme import WeightScheme

if TYPE_CHECKING:
    from torch import Tensor

SHRINKS = tuple(1 - step / 50 for step in range(16))
"""Tried parts of the scale with which the largest weight is a code."""


def may_be_signed(scheme: WeightScheme) -> bool:
    """Whether the scales may have signs: of few symmetric integer codes, one scale a group or row.

    With 8 bits there is nothing to gain.
    """
    few = scheme.type == "int" and scheme.num_bits <= 4
    return few and scheme.symmetric and scheme.strategy in ("group", "channel")


def with_signs(w_RC: Tensor, squares_C: Tensor, on: Grid, scheme: WeightScheme) -> Grid:
    """The grid, with a signed scale wherever the error is less: sum of (w - q)^2 * mean square of
    the column's input, each weight rounded by itself."""
    R, C = w_RC.shape
    G = on.divisor.shape[1]
    w_RGL = w_RC.float().view(R, G, C // G)
    weight_GL = squares_C.float().view(G, C // G)
    scratch = Scratch(w_RC.device)

    def error_RG(divisor_RG: Tensor) -> Tensor:
        units_RGL = w_RGL / divisor_RG[..., None]
        number_RGL = round_to_numbers(units_RGL.view(R, C), None, scheme, scratch).view(R, G, -1)
        return (number_RGL * divisor_RG[..., None]).sub_(w_RGL).square_().mul_(weight_GL).sum(-1)

    largest_RG = w_RGL.gather(-1, w_RGL.abs().argmax(-1, keepdim=True))[..., 0]
    best_RG = on.divisor.float()
    least_RG = error_RG(best_RG)
    for shrink in SHRINKS:
        tried_RG = storable(largest_RG * (-shrink / (1 << scheme.num_bits - 1)), on)
        lost_RG = torch.where(tried_RG == 0, torch.inf, error_RG(tried_RG))
        best_RG = torch.where(lost_RG < least_RG, tried_RG, best_RG)
        least_RG = torch.minimum(lost_RG, least_RG)
    return with_divisors(on, best_RG)
