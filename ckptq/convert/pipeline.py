"""The streaming pipeline: every unit from its place in the source to its place in the output.

Each thread reads, quantizes and writes a run of rows at a time, in memory that it reuses. What does
not stream by rows (a transposed expert) is read whole into a slab first. The output does not depend
on scheduling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial, reduce

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, bytes_of
from ckptq.checkpoint.view import View, window
from ckptq.checkpoint.write import Run, Shards
from ckptq.convert.arithmetic import OnCores
from ckptq.convert.blocks import Span, blocks, runs
from ckptq.convert.schedule import Schedule, Task, Work
from ckptq.convert.slabs import Slab, Slabs, Whole, held_bytes
from ckptq.models.encoded import Encoded, Held, HeldWhole
from ckptq.models.quantized.repacked import remade, repacked_constants, repacked_rows
from ckptq.models.weight import naming
from ckptq.models.weight_rows import (
    Place,
    Rows,
    decoded_rows,
    outermost_rows,
    parts_of,
    weight_rows,
)
from ckptq.permute.reordered import Reordered, Source
from ckptq.plan.unit import Part, Unit
from ckptq.quantize.formats import constants, merge_statistic, needs_statistic
from ckptq.quantize.stored import stored_span

COPY_BYTES = 1 << 24

Make = Callable[[int, int], Mapping[str, Tensor]]
"""(start, stop) -> what is stored for these rows of a Linear."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """What a conversion reads from and writes to."""

    files: Files
    scales: Mapping[str, Tensor]
    made: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Quantized where calibration ran the layers; a unit's parts are all in it, or none."""
    shards: Shards
    slabs: Slabs
    source_lasts: bool = True
    """Whether copies can be compared with their source when the run resumes."""
    arithmetic: OnCores = field(default_factory=OnCores)


def convert(
    units: Iterable[Unit], ends: Ends, schedule: Schedule, finished: Callable[[Unit], None]
) -> None:
    """Do all units; `finished` is called for each when its last byte is written."""
    for unit in units:
        if held_bytes(unit):
            schedule.wait_while(ends.slabs.all_taken)
        schedule.add(work(unit, ends), partial(finished, unit))
    schedule.drain()


def work(unit: Unit, ends: Ends) -> Work:
    """The work for one unit, step by step."""
    if any(f"{part.linear.name}.{part.scheme.codes}" in ends.made for part in unit.parts):
        yield list(_made_tasks(unit, ends))
        unit = replace(unit, parts=())
    with ends.slabs.of(unit) as slabs:
        distinct = {id(slab): slab for slab in slabs.values()}
        yield [task for slab in distinct.values() for task in slab.read_tasks(ends.files)]
        rows = {view: _rows(view, slabs, ends) for view in unit.views.values()}
        for part in unit.parts:
            rows[part.weight] = _rows(part.weight, slabs, ends, ends.arithmetic.place)
        shared = None
        if unit.parts and not unit.parts[0].kept and needs_statistic(unit.parts[0].scheme):
            found: list[Tensor] = []
            yield list(_statistic_tasks(unit, rows, found, ends))
            shared = reduce(merge_statistic, found)
        makers = {part.linear.name: _maker(part, rows, slabs, shared, ends) for part in unit.parts}
        yield [*_copy_tasks(unit, rows, ends), *_part_tasks(unit, makers, shared, ends)]


def _maker(
    part: Part,
    rows: Mapping[Source, Rows],
    slabs: Mapping[Whole, Slab],
    shared: Tensor | None,
    ends: Ends,
) -> Make:
    """What makes the stored tensors of rows of a Linear."""
    weight = part.weight
    if part.kept:
        assert isinstance(weight, Encoded)
        parts = parts_of(ends.files, remade(weight), _held(weight, slabs))
        return lambda start, stop: repacked_rows(weight, parts(start, stop))

    def quantized(start: int, stop: int) -> Mapping[str, Tensor]:
        with naming(part.linear.name, weight.stored), ends.arithmetic.turn(part.linear.name):
            return ends.arithmetic.quantize(rows[weight](start, stop), part.scheme, shared)

    return quantized


def _held(weight: Encoded, slabs: Mapping[Whole, Slab]) -> Held | None:
    """The stored tensors of a weight that is held whole."""
    if not isinstance(weight, HeldWhole):
        return None
    return dict(zip(weight.tensors, slabs[weight].tensors, strict=True))


def _rows(
    view: Source, slabs: Mapping[Whole, Slab], ends: Ends, place: Place | None = None
) -> Rows:
    """How to get rows of a weight: reordered, dequantized, from its file, cut out of its slab.

    What is dequantized is so where `place` takes it.
    """
    if isinstance(view, Reordered):
        moved, rows = view.moved, _rows(view.inner, slabs, ends)
        return lambda start, stop: moved(rows(start, stop))
    if isinstance(view, Encoded):
        return decoded_rows(ends.files, view, _held(view, slabs), place)
    if not isinstance(view, View) or view not in slabs:
        return weight_rows(ends.files, view, ends.arithmetic.memory)
    return _cut_out(view, slabs[view], ends)


def _cut_out(view: View, slab: Slab, ends: Ends) -> Rows:
    """Rows of a transposed or interleaved window, in the thread's own memory."""
    matrix = window(slab.tensors[0], view)

    def cut(start: int, stop: int) -> Tensor:
        part_RC = matrix[start:stop]
        made_RC = ends.arithmetic.memory.tensor(tuple(part_RC.shape), part_RC.dtype)
        if view.transposed:
            # a transpose in two steps, both of which torch does in blocks: 8 times as fast as one
            turned_CR = ends.arithmetic.scratch.tensor(
                "turned", (part_RC.shape[1], len(part_RC)), part_RC.dtype
            )
            part_RC = turned_CR.copy_(part_RC.t()).t()
        return made_RC.copy_(part_RC)

    return cut


def _statistic_tasks(
    unit: Unit, rows: Mapping[Source, Rows], found: list[Tensor], ends: Ends
) -> Iterator[Task]:
    """A first pass, for the one number that all parts of the unit share."""
    for part in unit.parts:
        view = part.weight
        few = None
        if part.scheme.search is None and not isinstance(view, Reordered):
            few = outermost_rows(ends.files, view, ends.arithmetic.place)
        for run in runs(view.spec, view.quantum):
            yield partial(_statistic_of_run, part, few or rows[view], run, found, ends.arithmetic)


def _statistic_of_run(
    part: Part, rows: Rows, run: Span, found: list[Tensor], arithmetic: OnCores
) -> None:
    weight = part.weight
    for start, stop in blocks(run, weight.spec, weight.quantum, arithmetic.elements):
        with naming(part.linear.name, part.weight.stored), arithmetic.turn(part.linear.name):
            found.append(arithmetic.statistic(rows(start, stop), part.scheme))


def _copy_tasks(unit: Unit, rows: Mapping[Source, Rows], ends: Ends) -> Iterator[Task]:
    """What goes over unchanged, and what calibration has made."""
    copy = ends.shards.copy if ends.source_lasts else ends.shards.copy_through
    for name, tensor in unit.copies.items():
        for start in range(0, tensor.nbytes, COPY_BYTES):
            count = min(COPY_BYTES, tensor.nbytes - start)
            yield partial(copy, name, tensor, ends.files, start, count)
    for name, view in unit.views.items():
        for run in runs(view.spec, view.quantum):
            yield partial(_cut_out_run, name, view, rows[view], run, ends.shards)
    for name in unit.scales:
        yield partial(ends.shards.write, name, 0, bytes_of(ends.scales[name].contiguous()))


def _made_tasks(unit: Unit, ends: Ends) -> Iterator[Task]:
    """The parts of a unit whose codes are there already."""
    for part in unit.parts:
        for local in part.writes:
            name = f"{part.linear.name}.{local}"
            tensor = ends.made[name]
            for start in range(0, tensor.nbytes, COPY_BYTES):
                count = min(COPY_BYTES, tensor.nbytes - start)
                yield partial(ends.shards.copy_through, name, tensor, ends.files, start, count)


def _cut_out_run(name: str, view: Source, rows: Rows, run: Span, shards: Shards) -> None:
    row_bytes = view.spec.nbytes // view.spec.shape[0]
    with shards.run(name, run[0] * row_bytes) as written:
        for start, stop in blocks(run, view.spec, view.quantum):
            written.write(bytes_of(rows(start, stop)))


def _part_tasks(
    unit: Unit, makers: Mapping[str, Make], shared: Tensor | None, ends: Ends
) -> Iterator[Task]:
    for part in unit.parts:
        spec = part.weight.spec
        for local, tensor in _constants(part, shared, ends).items():
            data = bytes_of(tensor.contiguous())
            yield partial(ends.shards.write, f"{part.linear.name}.{local}", 0, data)
        for run in runs(spec, part.quantum) if part.has_rows else ():
            yield partial(_make_run, part, makers[part.linear.name], run, ends)


def _constants(part: Part, shared: Tensor | None, ends: Ends) -> Mapping[str, Tensor]:
    """What belongs to no row."""
    if part.kept:
        assert isinstance(part.weight, Encoded)
        return repacked_constants(part.weight, ends.files)
    return constants(part.weight.spec, part.scheme, shared)


def _make_run(part: Part, make: Make, run: Span, ends: Ends) -> None:
    """Make a run of rows block by block and write each where it belongs."""
    weight = part.weight.spec
    with ExitStack() as stack:
        written: dict[str, Run] = {}
        for start, stop in blocks(run, weight, part.quantum, ends.arithmetic.elements):
            for local, tensor in make(start, stop).items():
                if local not in written:
                    spec = part.writes[local]
                    first, _ = stored_span(local, part.scheme, weight.shape[1], *run)
                    at = first * (spec.nbytes // spec.shape[0])
                    name = f"{part.linear.name}.{local}"
                    written[local] = stack.enter_context(ends.shards.run(name, at))
                written[local].write(bytes_of(tensor.contiguous()))


def single_threaded_torch() -> None:
    """Each worker computes on its own; torch's threads would only compete."""
    torch.set_num_threads(1)


def workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "ckptq", initializer=single_threaded_torch)
