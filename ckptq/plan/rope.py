"""RoPE row order as a stage: units in the source's order become units in the requested one.

`ckptq permute` puts it behind units that copy, `ckptq quantize --rope-order` before quantization.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import SINGLE, Checkpoint
from ckptq.errors import UsageError
from ckptq.models.family import family_of
from ckptq.permute import marks
from ckptq.permute.effect import Effect, Move, Part
from ckptq.permute.reordered import Reordered, Source, reordered_tensor
from ckptq.permute.targets import Permutation, read_permutation
from ckptq.plan.unit import Unit
from ckptq.rope_order import RopeOrder

ALL = tuple(Part)


@dataclass(frozen=True, slots=True)
class Reordering:
    """Which parts of q/k get which order, and the marks that say so afterwards."""

    permutation: Permutation
    to: RopeOrder
    only: frozenset[Part]
    marks: marks.Marks = field(default_factory=dict)

    def effect_on(self, stored: StoredTensor) -> Effect | None:
        """How a tensor's rows move; None where they stay."""
        effect = self.permutation.effect_on(stored)
        if effect is None or effect.move is Move.KEPT or not stored.nbytes:
            return None
        return effect if effect.part in self.only else None

    def units(self, units: Iterable[Unit]) -> tuple[Unit, ...]:
        """The same units, each reading its tensors in the requested order.

        PlanError, naming the tensor, for one that is unknown or cannot be permuted.
        """
        return tuple(map(self._unit, units))

    def _unit(self, unit: Unit) -> Unit:
        views = {name: self._source(view) for name, view in unit.views.items()}
        moved = {n: effect for n, t in unit.copies.items() if (effect := self.effect_on(t))}
        views |= {n: reordered_tensor(unit.copies[n], e, self.to) for n, e in moved.items()}
        turned = any(isinstance(view, Reordered) for view in views.values())
        return replace(
            unit,
            rule=f"{unit.rule}; {self.to} RoPE order" if turned and not unit.parts else unit.rule,
            copies={name: tensor for name, tensor in unit.copies.items() if name not in moved},
            views=views,
            parts=tuple(replace(p, weight=self._source(p.weight)) for p in unit.parts),
        )

    def _source(self, source: Source) -> Source:
        effect = self.effect_on(source.stored)
        if effect is None or isinstance(source, Reordered):
            return source
        return Reordered(source, effect, self.to, source.written)


def reordering(ckpt: Checkpoint, to: RopeOrder, only: Collection[Part] = ALL) -> Reordering:
    """How to bring a checkpoint into order `to`.

    Raises UsageError if a part is already in that order, SourceError for contradictory marks,
    PlanError for a model without q_proj and k_proj.
    """
    family = RopeOrder(family_of(ckpt.config).rope)
    now = marks.applied(read_marks(ckpt), to, only, family)
    return Reordering(read_permutation(ckpt), to, frozenset(only), now)


def read_marks(ckpt: Checkpoint) -> marks.Marks:
    """The orders that the source is marked with; they hold for the output as well."""
    return marks.read(ckpt.config, {h.file.name: h.metadata for h in ckpt.headers})


@dataclass(frozen=True, kw_only=True, slots=True)
class PermutePlan:
    """All that `ckptq permute` will do, decided from headers and config."""

    order: Reordering
    shards: Mapping[str, tuple[Unit, ...]]
    """The source's own; a single one gets the name that every loader looks for."""

    @property
    def moved(self) -> dict[Part, int]:
        """How many tensors of each part get their rows moved."""
        units = (unit for units in self.shards.values() for unit in units)
        views = (view for unit in units for view in unit.views.values())
        return Counter(view.effect.part for view in views if isinstance(view, Reordered))


def plan_permute(ckpt: Checkpoint, to: RopeOrder, only: Collection[Part] = ALL) -> PermutePlan:
    """A unit for each tensor, in the shard that it is in.

    Raises what `reordering` and its `units` raise, and UsageError where nothing would move.
    """
    order = reordering(ckpt, to, only)
    shards = {
        header.file.name: order.units(
            Unit(key=name, rule="copied", copies={name: tensor})
            for name, tensor in header.tensors.items()
        )
        for header in ckpt.headers
    }
    plan = PermutePlan(
        order=order, shards=shards if len(shards) > 1 else {SINGLE: next(iter(shards.values()))}
    )
    if not plan.moved:
        raise UsageError(
            f"{ckpt.path}: q/k have no {' or '.join(sorted(only))} indexed by row; there is "
            "nothing to permute"
        )
    return plan
