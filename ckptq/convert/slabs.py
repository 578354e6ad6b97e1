"""Memory for weights that cannot be streamed by rows: a transposed expert is held whole.

Units reuse a fixed number of rooms, so that memory stays within the plan and pages are faulted in
only once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ckptq.checkpoint.read import Files
from ckptq.checkpoint.view import View, read_slab_rows
from ckptq.convert.schedule import Task
from ckptq.permute.reordered import Source
from ckptq.plan.unit import Unit
from ckptq.spec import TensorSpec, torch_dtype

BAND_BYTES = 1 << 24
"""What one task reads of a slab."""

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Slab:
    """One matrix in memory, and a view that lies on it."""

    view: View
    matrix: Tensor

    def read_tasks(self, files: Files) -> Iterator[Task]:
        """Tasks that together fill the matrix."""
        rows = self.matrix.shape[0]
        step = max(BAND_BYTES * rows // self.view.slab_bytes, 1)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield partial(read_slab_rows, files, self.view, self.matrix, start, stop)


class Slabs:
    """A number of rooms, each for the slabs of one unit at a time."""

    def __init__(self, room_bytes: int, rooms: int) -> None:
        self._room_bytes = room_bytes
        self._not_made = rooms
        self._free: list[Tensor] = []

    def all_taken(self) -> bool:
        return not self._free and not self._not_made

    @contextmanager
    def of(self, unit: Unit) -> Iterator[dict[View, Slab]]:
        """The slabs of a unit by the views on them, not yet read; views that stream have none."""
        views = [v for v in views_of(unit) if isinstance(v, View) and not v.streams]
        if not views:
            yield {}
            return
        room = self._take()
        yield _furnish(room, views)
        self._free.append(room)

    def _take(self) -> Tensor:
        if self._free:
            return self._free.pop()
        assert self._not_made, "more units hold slabs than there are rooms"
        self._not_made -= 1
        return torch.empty(self._room_bytes, dtype=torch.uint8)


def _furnish(room: Tensor, views: list[View]) -> dict[View, Slab]:
    slabs: dict[object, Slab] = {}
    at = 0
    for view in views:
        if view.slab not in slabs:
            spec = view.slab_spec
            slabs[view.slab] = Slab(view, _tensor(room[at : at + spec.nbytes], spec))
            at += _aligned(spec.nbytes)
    return {view: slabs[view.slab] for view in views}


def _tensor(memory: Tensor, spec: TensorSpec) -> Tensor:
    return memory.view(torch_dtype(spec.dtype)).view(spec.shape)


def views_of(unit: Unit) -> list[Source]:
    """All windows that a unit looks through."""
    return [part.weight for part in unit.parts] + list(unit.views.values())


def held_bytes(unit: Unit) -> int:
    """The room that a unit's slabs need together; 0 where everything streams."""
    sizes = {view.slab: view.slab_bytes for view in views_of(unit)}
    return sum(map(_aligned, sizes.values()))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
