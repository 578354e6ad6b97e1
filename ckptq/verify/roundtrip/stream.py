"""Every quantized Linear against its source, streamed; memory holds a few runs of rows, or a slab.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ckptq.checkpoint.read import Files, read_tensor
from ckptq.checkpoint.view import View, read_slab, window
from ckptq.models.encoded import Encoded
from ckptq.models.weight import naming
from ckptq.models.weight_rows import Rows, rows_of, weight_rows
from ckptq.verify.report import Finding, TensorResult
from ckptq.verify.roundtrip.impossible_codes import check_codes
from ckptq.verify.roundtrip.tally import Tally, compare, floor_db
from ckptq.verify.roundtrip.undo import Undo
from ckptq.verify.stored_linear import Held, StoredLinear

if TYPE_CHECKING:
    from torch import Tensor

FAST_ELEMENTS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Results for some rows of a Linear."""

    name: str
    nbytes: int
    tally: Tally | None
    """None where there is no source to compare with."""
    findings: tuple[Finding, ...] = field(default_factory=tuple)


def tasks(
    linears: Iterable[StoredLinear], files: Files, undo: Undo, fast: bool
) -> Iterator[Callable[[], list[Part]]]:
    """One task for a run of rows; one for all Linears that are cut out of the same slab."""
    slabs: dict[object, list[StoredLinear]] = {}
    for linear in linears:
        origin = linear.module.origin
        if origin is not None and undo.module(linear.name, linear.tensors):
            yield partial(_permuted, linear, files, undo)
        elif origin is None or origin.weight.streams:
            for start, stop in spans(linear, fast):
                yield partial(_run, linear, files, start, stop)
        else:
            slabs.setdefault(origin.weight.slab, []).append(linear)
    for group in slabs.values():
        yield partial(_slab, group, files, fast)


def spans(linear: StoredLinear, fast: bool) -> list[tuple[int, int]]:
    """All runs of rows, or with `fast` a first, a middle and a last one of few rows."""
    if not fast:
        return linear.runs()
    runs = linear.runs(FAST_ELEMENTS)
    return [runs[i] for i in sorted({0, len(runs) // 2, len(runs) - 1})]


def _run(linear: StoredLinear, files: Files, start: int, stop: int) -> list[Part]:
    origin = linear.module.origin
    rows = weight_rows(files, origin.weight) if origin is not None else None
    return [_compare(linear, linear.read(files, start, stop), rows, start, stop)]


def _slab(linears: list[StoredLinear], files: Files, fast: bool) -> list[Part]:
    """gate and up of one expert share a slab: read it once."""
    weights = [one.module.origin.weight for one in linears if one.module.origin is not None]
    first = weights[0]
    slab = read_slab(files, first) if isinstance(first, View) else None
    parts = []
    for linear, weight in zip(linears, weights, strict=True):
        if slab is not None and isinstance(weight, View):
            rows = rows_of(window(slab, weight))
        else:
            rows = weight_rows(files, weight)
        for start, stop in spans(linear, fast):
            parts.append(_compare(linear, linear.read(files, start, stop), rows, start, stop))
    return parts


def _permuted(linear: StoredLinear, files: Files, undo: Undo) -> list[Part]:
    """Whole, because rows of one head move about."""
    w_RC, held = whole(linear, files, undo)
    return [_compare(linear, held, lambda start, stop: w_RC[start:stop], 0, linear.shape[0])]


def whole(linear: StoredLinear, files: Files, undo: Undo) -> tuple[Tensor, Held]:
    """All rows of a Linear's source, and what is stored for them in the source's order."""
    origin = linear.module.origin
    assert origin is not None
    held = {
        local: undo.restore(tensor.name, read_tensor(tensor, files))
        for local, tensor in linear.tensors.items()
    }
    held = {k: t.reshape(-1) if linear.dims(k) == 1 else t for k, t in held.items()}
    return weight_rows(files, origin.weight)(0, linear.shape[0]), held


def _compare(linear: StoredLinear, held: Held, rows: Rows | None, start: int, stop: int) -> Part:
    """Block by block, so that everything stays in the cache."""
    source = rows(start, stop) if rows is not None else None
    tally, found = Tally(), list[Finding]()
    for first, last in linear.blocks(start, stop):
        cut = linear.cut(held, start, first, last)
        one = None
        if source is not None:
            w_RC = source[first - start : last - start]
            assert linear.module.origin is not None
            origin = linear.module.origin.weight
            alike = isinstance(origin, Encoded)
            with naming(linear.name, origin.stored):
                one = compare(w_RC, cut, linear.scheme, alike=alike)
            tally += one
        if one is None or one.unproved:
            found += check_codes(linear, cut)
    return Part(
        name=linear.name,
        nbytes=sum(tensor.nbytes for tensor in held.values()),
        tally=tally if source is not None else None,
        findings=tuple(found),
    )


def result_of(linear: StoredLinear, tally: Tally) -> TensorResult:
    """The row of the report's table."""
    return TensorResult(
        name=linear.name,
        scheme=str(linear.scheme),
        elements=tally.elements,
        snr_db=tally.snr_db,
        floor_db=floor_db(linear.scheme, linear.shape),
        codes_wrong=tally.wrong,
        codes_rounded_twice=tally.twice,
        scales_wrong=tally.scales_wrong,
        exact=tally.exact,
    )
