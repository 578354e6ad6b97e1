"""Checkpoints in another RoPE order than their source: restore its order.

`ckptq permute` marks what it has moved (ckptq.permute.marks); what is compared with the source has
to be moved back first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptq.errors import PlanError, SourceError
from ckptq.models.family import family_of
from ckptq.permute import marks
from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Effect, Move, Part
from ckptq.permute.targets import plan_permutation
from ckptq.rope_order import RopeOrder
from ckptq.verify.structure.geometry import well_typed
from ckptq.verify.structure.rope_readers import order_of
from ckptq.verify.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Undo:
    """Which tensors stand in another order than the source's, and the way back."""

    effects: Mapping[str, tuple[Effect, RopeOrder]] = field(default_factory=dict)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.effects

    def module(self, name: str, tensors: Mapping[str, object]) -> bool:
        """Whether any tensor of this module has to be moved."""
        return any(f"{name}.{local}" in self.effects for local in tensors)

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        """A whole tensor of the checkpoint, in the source's order."""
        if name not in self.effects:
            return tensor
        effect, to = self.effects[name]
        return permute_tensor(tensor, effect, to)


def make_undo(subject: Subject) -> Undo:
    """From the marks of both checkpoints; empty if they agree, or contradict themselves."""
    if subject.source is None:
        return Undo()
    try:
        wanted = {part: source_order(subject, part) for part in Part}
        ours = {part: order_of(subject, part) for part in Part}
        if ours == wanted or not well_typed(subject):
            return Undo()
        # tensors that do not fit the heads are reported elsewhere
        effects = plan_permutation(subject.ckpt, skip_unfit=True)
    except (PlanError, SourceError):
        return Undo()
    return Undo(
        {
            name: (effect, wanted[effect.part])
            for name, effect in effects.items()
            if effect.move is not Move.KEPT and ours[effect.part] is not wanted[effect.part]
        }
    )


def source_order(subject: Subject, part: Part = Part.WEIGHTS) -> RopeOrder:
    """The order that the source's rows are in, by its marks or its family; without a source, the
    checkpoint's own."""
    source = subject.source
    if source is None:
        return order_of(subject, part)
    metadata = {header.file.name: header.metadata for header in source.headers}
    marked = marks.read(source.config, metadata).get(part)
    return marked or RopeOrder(family_of(source.config).rope)
