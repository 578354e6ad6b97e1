"""Memory for weights that cannot be streamed by rows: a transposed expert is held whole, and so are
GPTQ's and AWQ's codes.

Units reuse a fixed number of rooms, so that memory stays within the plan and pages are faulted in
only once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, bytes_of, read_into
from ckptq.checkpoint.view import View
from ckptq.convert.schedule import Task
from ckptq.models.encoded import Encoded, HeldWhole
from ckptq.permute.reordered import Reordered, Source
from ckptq.plan.unit import Unit
from ckptq.spec import TensorSpec, torch_dtype

BAND_BYTES = 1 << 24
"""What one task reads of a slab."""

ALIGNMENT = 64

Whole = View | HeldWhole
"""What cannot be read by rows."""


@dataclass(frozen=True, slots=True)
class Slab:
    """Stored tensors that are in memory whole."""

    pieces: tuple[StoredTensor, ...]
    tensors: tuple[Tensor, ...]

    def read_tasks(self, files: Files) -> Iterator[Task]:
        """Tasks that together fill the tensors."""
        for piece, tensor in zip(self.pieces, self.tensors, strict=True):
            data = bytes_of(tensor)
            for start in range(0, piece.nbytes, BAND_BYTES):
                yield partial(read_into, files, piece, start, data[start : start + BAND_BYTES])


class Slabs:
    """A number of rooms, each for the slabs of one unit at a time."""

    def __init__(self, room_bytes: int, rooms: int) -> None:
        self._room_bytes = room_bytes
        self._not_made = rooms
        self._free: list[Tensor] = []

    def all_taken(self) -> bool:
        return not self._free and not self._not_made

    @contextmanager
    def of(self, unit: Unit) -> Iterator[dict[Whole, Slab]]:
        """The slabs of a unit by the weights in them, not yet read; what streams has none."""
        whole = [weight for weight in map(_inner, views_of(unit)) if not weight.streams]
        if not whole:
            yield {}
            return
        room = self._take()
        yield _furnish(room, whole)
        self._free.append(room)

    def _take(self) -> Tensor:
        if self._free:
            return self._free.pop()
        assert self._not_made, "more units hold slabs than there are rooms"
        self._not_made -= 1
        return torch.empty(self._room_bytes, dtype=torch.uint8)


def _furnish(room: Tensor, weights: Iterable[View | Encoded]) -> dict[Whole, Slab]:
    slabs: dict[object, Slab] = {}
    found: dict[Whole, Slab] = {}
    at = 0
    for weight in weights:
        assert isinstance(weight, View | HeldWhole)
        if weight.slab not in slabs:
            tensors = []
            for piece in weight.slab_pieces:
                tensors.append(_tensor(room[at : at + piece.nbytes], piece.spec))
                at += _aligned(piece.nbytes)
            slabs[weight.slab] = Slab(weight.slab_pieces, tuple(tensors))
        found[weight] = slabs[weight.slab]
    return found


def _tensor(memory: Tensor, spec: TensorSpec) -> Tensor:
    return memory.view(torch_dtype(spec.dtype)).view(spec.shape)


def _inner(weight: Source) -> View | Encoded:
    return weight.inner if isinstance(weight, Reordered) else weight


def views_of(unit: Unit) -> list[Source]:
    """All windows that a unit looks through."""
    return [part.weight for part in unit.parts] + list(unit.views.values())


def held_bytes(unit: Unit) -> int:
    """The room that a unit's slabs need together; 0 where everything streams."""
    pieces = {weight.slab: weight.slab_pieces for weight in map(_inner, views_of(unit))}
    return sum(_aligned(piece.nbytes) for held in pieces.values() for piece in held)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
