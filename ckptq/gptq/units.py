"""A unit of a plan quantized by GPTQ: its grid, then the codes of each of its Linears.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from ckptq.forward.reader import Reader
from ckptq.gptq.choose import choose
from ckptq.gptq.hessians import Hessians
from ckptq.gptq.told import Told
from ckptq.models.weight import naming
from ckptq.models.weight_rows import whole_weight
from ckptq.plan.unit import Part, Plan, Unit
from ckptq.quantize.formats import (
    codes_on,
    constants,
    grid,
    merge_statistic,
    needs_statistic,
    quantize,
    statistic,
)
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Gptq

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Made = dict[str, "Tensor"]
"""Stored tensors by their names in the output, on the CPU."""


class Units:
    """Those of one plan."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._how = plan.recipe.gptq or Gptq()
        schemes = {group.name: group.weights or Args() for group in plan.recipe.groups}
        self._args = {name: schemes[g] for g, names in plan.groups.items() for name in names}
        self._reader = Reader(device)

    def quantized(self, unit: Unit, hessians: Hessians, told: Told) -> Made:
        """What is stored of its Linears. SourceError for a weight that is not finite."""
        take = self._reader.take
        weights = {p.linear.name: whole_weight(take, p.linear.weight) for p in unit.parts}
        shared = _shared(unit, weights)
        made: Made = {}
        for part in unit.parts:
            name = part.linear.name
            with naming(name, part.weight.stored):
                found = self._linear(part, weights.pop(name), shared, hessians, told)
            found |= constants(part.weight.spec, part.scheme, shared)
            made |= {f"{name}.{local}": tensor.cpu().clone() for local, tensor in found.items()}
        return made

    def _linear(
        self, part: Part, w_RC: Tensor, shared: Tensor | None, hessians: Hessians, told: Told
    ) -> dict[str, Tensor]:
        name, scheme = part.linear.name, part.scheme
        hessian = hessians.take(name)
        if hessian is None:
            told.nearest.append(name)
            return quantize(w_RC, scheme, shared)
        on = grid(w_RC, scheme, shared)
        chosen = choose(w_RC, hessian.mean(), on, self._args[name], self._how)
        if not chosen.solved:
            told.unsolved.append(name)
        return {scheme.codes: codes_on(chosen.weight_RC.to(w_RC.dtype), on, scheme), **on.stored}


def _shared(unit: Unit, weights: dict[str, Tensor]) -> Tensor | None:
    """The one number that all parts of the unit share."""
    found = []
    for part in unit.parts:
        with naming(part.linear.name, part.weight.stored):
            if needs_statistic(part.scheme):
                found.append(statistic(weights[part.linear.name], part.scheme))
    return reduce(merge_statistic, found) if found else None
