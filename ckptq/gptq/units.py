"""A unit of a plan quantized by what its inputs were: its grid, then the codes of each Linear.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING

from ckptq.forward.reader import Reader
from ckptq.gptq.choose import Choice, Chosen, choose, weighed_ranges
from ckptq.gptq.descent import descend
from ckptq.gptq.moments import Moments, Seen
from ckptq.gptq.signs import may_be_signed, with_signs
from ckptq.gptq.told import Told
from ckptq.models.weight import naming
from ckptq.models.weight_rows import whole_weight
from ckptq.plan.unit import Part, Plan, Unit
from ckptq.quantize.formats import (
    Ranges,
    codes_on,
    constants,
    grid,
    merge_statistic,
    needs_statistic,
    statistic,
    statistic_of,
)
from ckptq.quantize.tiles import check_finite
from ckptq.recipes.args import Args

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Made = dict[str, "Tensor"]
"""Stored tensors by their names in the output, on the CPU."""


BATCH_BYTES = 1 << 30
"""Of Hessians that a GPU works on at a time; experts are small, and there are many."""

FLOAT32_BYTES = 4


class Units:
    """Those of one plan."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._how = plan.recipe.gptq
        groups = {group.name: group.weights or Args() for group in plan.recipe.groups}
        self._args = {name: groups[g] for g, names in plan.groups.items() for name in names}
        self._reader = Reader(device)

    def in_batches(self, units: Sequence[Unit]) -> Iterator[list[Unit]]:
        """The units that are quantized at a time: one on a CPU, several of a kind on a GPU."""
        by_kind = sorted(units, key=self._kind) if self._reader.device.type == "cuda" else units
        for kind, alike in groupby(by_kind, self._kind):
            each = sum(FLOAT32_BYTES * C * C for (_, C), _ in kind)
            most = BATCH_BYTES // each if self._reader.device.type == "cuda" else 1
            left = list(alike)
            for start in range(0, len(left), max(most, 1)):
                yield left[start : start + max(most, 1)]

    def _kind(self, unit: Unit) -> list[tuple[tuple[int, ...], str]]:
        return [(part.weight.spec.shape, str(self._args[part.linear.name])) for part in unit.parts]

    def quantized(self, units: Sequence[Unit], seen: Seen, told: Told) -> Made:
        """What is stored of their Linears. SourceError for a weight that is not finite."""
        made: Made = {}
        held = [self._held(unit, seen) for unit in units]
        for alike in zip(*held, strict=True):
            for each, w_RC in zip(alike, self._weights(alike, told), strict=True):
                scheme = each.part.scheme
                found = {scheme.codes: codes_on(w_RC, each.on, scheme), **each.on.stored}
                found |= constants(each.part.weight.spec, scheme, each.shared)
                made |= {f"{each.name}.{local}": t.cpu().clone() for local, t in found.items()}
        return made

    def _held(self, unit: Unit, seen: Seen) -> list[_Weight]:
        """The parts of a unit with their grids."""
        found = []
        for part in unit.parts:
            name = part.linear.name
            w_RC = whole_weight(self._reader.take, part.linear.weight)
            found.append(_Weight.of(part, w_RC, seen.take(name), self._args[name]))
        statistics = [each.statistic() for each in found if needs_statistic(each.part.scheme)]
        shared = reduce(merge_statistic, statistics) if statistics else None
        for each in found:
            each.fix(shared)
        return found

    def _weights(self, alike: Sequence[_Weight], told: Told) -> Iterator[Tensor]:
        """Each weight as it is to be rounded: as it is, or as GPTQ chose it."""
        ready = {each.name: each for each in alike if each.moments is not None}
        chosen: dict[str, Chosen] = {}
        if self._how is not None and ready:
            if self._how.descents and may_be_signed(alike[0].part.scheme):
                for each in ready.values():
                    each.sign()
            choices = [each.choice() for each in ready.values()]
            args = self._args[next(iter(ready))]
            made = choose(choices, args, self._how)
            made = descend(choices, made, alike[0].part.scheme, self._how)
            chosen = dict(zip(ready, made, strict=True))
        for each in alike:
            if each.moments is None:
                told.nearest.append(each.name)
            elif each.moments.left_out:
                told.massive[each.name] = each.moments.left_out
            if each.name in chosen and not chosen[each.name].solved:
                told.unsolved.append(each.name)
            if each.name in chosen:
                each.on = chosen[each.name].on
                # oneshot adds a zero point of 0 to what GPTQ made, so that no -0 is left
                yield chosen[each.name].weight_RC.to(each.w_RC.dtype) + 0.0
            else:
                yield each.w_RC


@dataclass
class _Weight:
    """One part at work."""

    part: Part
    w_RC: Tensor
    moments: Moments | None
    """Of its inputs; None where no token reached it."""
    ranges: Ranges | None
    """Where its inputs decide on them."""
    shared: Tensor | None = None
    """The one number that all parts of its unit have in common."""

    @classmethod
    def of(cls, part: Part, w_RC: Tensor, moments: Moments | None, args: Args) -> _Weight:
        with naming(part.linear.name, part.weight.stored):
            check_finite(w_RC)
        ranges = None
        if moments is not None and args.weighed:
            ranges = weighed_ranges(w_RC, moments, args)
        return cls(part, w_RC, moments, ranges)

    @property
    def name(self) -> str:
        return self.part.linear.name

    def statistic(self) -> Tensor:
        """Its share in what all parts have in common."""
        if self.ranges is not None:
            return statistic_of(self.ranges)
        return statistic(self.w_RC, self.part.scheme)

    def fix(self, shared: Tensor | None) -> None:
        """Settle the grid."""
        self.shared = shared
        self.on = grid(self.w_RC, self.part.scheme, shared, self.ranges)

    def sign(self) -> None:
        """Let scales have signs."""
        assert self.moments is not None
        self.on = with_signs(self.w_RC, self.moments.squares_F, self.on, self.part.scheme)

    def choice(self) -> Choice:
        assert self.moments is not None
        return Choice(self.w_RC, self.moments.hessian(), self.on)
