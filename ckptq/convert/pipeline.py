"""The streaming pipeline: every unit from its place in the source to its place in the output.

Work goes in runs of blocks of rows that stay in a core's cache: read, quantized and written by one
thread, on all cores at once. Only what does not stream by rows (a transposed expert) is held whole.
Which thread does what, and when, changes nothing in the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from ckptq.checkpoint.read import Files, bytes_of
from ckptq.checkpoint.view import View, read_rows, read_slab, window
from ckptq.checkpoint.write import Shards
from ckptq.convert.schedule import Schedule
from ckptq.errors import SourceError
from ckptq.plan.unit import Part, Unit
from ckptq.quantize.formats import (
    BLOCK_ELEMENTS,
    constants,
    merge_statistic,
    needs_statistic,
    quantize,
    statistic,
)
from ckptq.quantize.stored import row_quantum, stored
from ckptq.quantize.tiles import NonFinite
from ckptq.spec import TensorSpec

RUN_ELEMENTS = 1 << 23
"""Elements that one task handles, block after block: 16 MB of bf16."""

COPY_BYTES = 1 << 26

Rows = Callable[[int, int], Tensor]
"""(start, stop) -> these rows of a weight, [stop - start, C]."""


def convert(
    units: Iterable[Unit],
    scales: Mapping[str, Tensor],
    shards: Shards,
    schedule: Schedule,
    files: Files,
    finished: Callable[[Unit], None],
) -> None:
    """Do all units; `finished` is called for each, in order, when its last byte is written."""
    for unit in units:
        tasks = list(_tasks(unit, scales, shards, schedule, files))
        schedule.add(tasks, held_bytes(unit), partial(finished, unit))
    schedule.drain()


def held_bytes(unit: Unit) -> int:
    """Memory for what does not stream: each slab once."""
    views = [part.linear.weight for part in unit.parts] + list(unit.views.values())
    return sum({view.slab: view.slab_bytes for view in views}.values())


def _tasks(
    unit: Unit, scales: Mapping[str, Tensor], shards: Shards, schedule: Schedule, files: Files
) -> Iterator[Callable[[], None]]:
    for name, tensor in unit.copies.items():
        source = files.descriptor(tensor.file)
        for start in range(0, tensor.nbytes, COPY_BYTES):
            count = min(COPY_BYTES, tensor.nbytes - start)
            yield partial(shards.copy, name, start, source, tensor.offset + start, count)
    for name, view in unit.views.items():
        yield partial(_cut_out, name, view, shards, files)
    for name in unit.scales:
        yield partial(shards.write, name, 0, bytes_of(scales[name].contiguous()))
    if unit.parts:
        yield from _quantize_tasks(unit, shards, schedule, files)


def _cut_out(name: str, view: View, shards: Shards, files: Files) -> None:
    tensor = window(read_slab(files, view), view).contiguous()
    shards.write(name, 0, bytes_of(tensor))


def _quantize_tasks(
    unit: Unit, shards: Shards, schedule: Schedule, files: Files
) -> Iterator[Callable[[], None]]:
    shared = None
    if needs_statistic(unit.parts[0].scheme):
        shared = _shared_statistic(unit, schedule, files)
    for part in unit.parts:
        made = constants(part.linear.weight.spec, part.scheme, shared)
        for local, tensor in made.items():
            name = f"{part.linear.name}.{local}"
            yield partial(shards.write, name, 0, bytes_of(tensor.contiguous()))
    streaming = [p for p in unit.parts if p.linear.weight.streams]
    for part in streaming:
        rows = partial(read_rows, files, part.linear.weight)
        for start, stop in runs(part):
            yield partial(_quantize_run, part, rows, start, stop, shared, shards)
    if len(streaming) < len(unit.parts):
        yield partial(_quantize_slab, unit, shared, shards, files)


def _quantize_slab(unit: Unit, shared: Tensor | None, shards: Shards, files: Files) -> None:
    """All parts that are windows on one slab, which is read once."""
    slab = read_slab(files, unit.parts[0].linear.weight)
    for part in unit.parts:
        rows = _rows_of(window(slab, part.linear.weight))
        _quantize_run(part, rows, 0, part.linear.weight.spec.shape[0], shared, shards)


def _rows_of(matrix: Tensor) -> Rows:
    return lambda start, stop: matrix[start:stop].contiguous()


def _quantize_run(
    part: Part, rows: Rows, start: int, stop: int, shared: Tensor | None, shards: Shards
) -> None:
    """Quantize rows start..stop block by block and write each where it belongs."""
    per_quantum = _rows_per_quantum(part)
    for first, last in blocks(part, start, stop):
        with naming(part):
            made = quantize(rows(first, last), part.scheme, shared)
        for local, tensor in made.items():
            spec = part.writes[local]
            row = first * per_quantum[local] // row_quantum(part.scheme)
            row_bytes = spec.nbytes // spec.shape[0]
            data = bytes_of(tensor.contiguous())
            shards.write(f"{part.linear.name}.{local}", row * row_bytes, data)


def _rows_per_quantum(part: Part) -> dict[str, int]:
    """How many rows of each stored tensor one quantum of weight rows makes.

    Example: 128 weight rows make 1 row of block scales; 8 make 1 row of packed zero points.
    """
    weight = part.linear.weight.spec
    quantum = TensorSpec(weight.dtype, (row_quantum(part.scheme), weight.shape[1]))
    return {name: spec.shape[0] for name, spec in stored(quantum, part.scheme).items()}


def _shared_statistic(unit: Unit, schedule: Schedule, files: Files) -> Tensor:
    """The one number that all parts of the unit share: a first pass over their rows."""

    def run(part: Part, start: int, stop: int) -> Tensor:
        weight = part.linear.weight
        if weight.streams:
            rows: Rows = partial(read_rows, files, weight)
        else:
            rows = _rows_of(window(read_slab(files, weight), weight))
        found = None
        for first, last in blocks(part, start, stop):
            with naming(part):
                one = statistic(rows(first, last))
            found = one if found is None else merge_statistic(found, one)
        assert found is not None
        return found

    tasks = [partial(run, part, *span) for part in unit.parts for span in runs(part)]
    first, *rest = schedule.gather(tasks)
    for other in rest:
        first = merge_statistic(first, other)
    return first


def runs(part: Part) -> list[tuple[int, int]]:
    """Spans of rows that are worth a task of their own."""
    rows, columns = part.linear.weight.spec.shape
    if not part.linear.weight.streams:
        return [(0, rows)]
    step = _multiple(RUN_ELEMENTS // columns, row_quantum(part.scheme))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def blocks(part: Part, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Spans of rows that stay in the cache while they are quantized."""
    columns = part.linear.weight.spec.shape[1]
    step = _multiple(BLOCK_ELEMENTS // columns, row_quantum(part.scheme))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _multiple(count: int, quantum: int) -> int:
    """The largest multiple of the quantum within `count`, at least one quantum."""
    return max(math.floor(count / quantum), 1) * quantum


class naming:
    """Say which tensor of which file held a value that no scale can bring into range."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NonFinite):
            stored = self.part.linear.weight.stored
            raise SourceError(
                f"{stored.file}: tensor {stored.name!r} (for {self.part.linear.name}): {error}"
            ) from error


def single_threaded_torch() -> None:
    """Each worker computes alone; torch's own threads would only get in each other's way."""
    torch.set_num_threads(1)


def workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "ckptq", initializer=single_threaded_torch)
