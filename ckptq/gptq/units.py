"""A unit of a plan quantized by what its inputs were: its grid, then the codes of each Linear.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from ckptq.forward.reader import Reader
from ckptq.gptq.choose import choose, weighed_ranges
from ckptq.gptq.moments import Moments, Seen
from ckptq.gptq.told import Told
from ckptq.models.weight import naming
from ckptq.models.weight_rows import whole_weight
from ckptq.plan.unit import Part, Plan, Unit
from ckptq.quantize.formats import (
    Grid,
    NonFinite,
    Ranges,
    codes_on,
    constants,
    grid,
    merge_statistic,
    needs_statistic,
    statistic,
    statistic_of,
)
from ckptq.recipes.args import Args

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Made = dict[str, "Tensor"]
"""Stored tensors by their names in the output, on the CPU."""


class Units:
    """Those of one plan."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._how = plan.recipe.gptq
        schemes = {group.name: group.weights or Args() for group in plan.recipe.groups}
        self._args = {name: schemes[g] for g, names in plan.groups.items() for name in names}
        self._reader = Reader(device)

    def quantized(self, unit: Unit, seen: Seen, told: Told) -> Made:
        """What is stored of its Linears. SourceError for a weight that is not finite."""
        take = self._reader.take
        parts = [
            _Weight(part, whole_weight(take, part.linear.weight), seen.take(part.linear.name))
            for part in unit.parts
        ]
        for each in parts:
            each.find_ranges(self._args[each.name])
        statistics = [each.statistic() for each in parts if needs_statistic(each.part.scheme)]
        shared = reduce(merge_statistic, statistics) if statistics else None
        made: Made = {}
        for each in parts:
            found = self._linear(each, each.grid(shared), told)
            found |= constants(each.part.weight.spec, each.part.scheme, shared)
            made |= {f"{each.name}.{local}": t.cpu().clone() for local, t in found.items()}
        return made

    def _linear(self, each: _Weight, on: Grid, told: Told) -> dict[str, Tensor]:
        w_RC, moments, scheme = each.w_RC, each.moments, each.part.scheme
        if moments is None:
            told.nearest.append(each.name)
        elif moments.left_out:
            told.massive[each.name] = moments.left_out
        if moments is not None and self._how is not None:
            chosen = choose(w_RC, moments.hessian(), on, self._args[each.name], self._how)
            if not chosen.solved:
                told.unsolved.append(each.name)
            w_RC = chosen.weight_RC.to(w_RC.dtype)
        return {scheme.codes: codes_on(w_RC, on, scheme), **on.stored}


@dataclass
class _Weight:
    """One part at work."""

    part: Part
    w_RC: Tensor
    moments: Moments | None
    """Of its inputs; None where no token reached it."""
    ranges: Ranges | None = None
    """Where its inputs decide on them."""

    @property
    def name(self) -> str:
        return self.part.linear.name

    def find_ranges(self, args: Args) -> None:
        with naming(self.name, self.part.weight.stored):
            if not self.w_RC.isfinite().all():
                raise NonFinite("NaN or Inf")
        if self.moments is not None and args.weighed:
            self.ranges = weighed_ranges(self.w_RC, self.moments, args)

    def statistic(self) -> Tensor:
        """Its share in the one number that all parts of the unit have in common."""
        if self.ranges is not None:
            return statistic_of(self.ranges)
        return statistic(self.w_RC, self.part.scheme)

    def grid(self, shared: Tensor | None) -> Grid:
        return grid(self.w_RC, self.part.scheme, shared, self.ranges)
