"""How the rows of a weight are divided: runs for threads, blocks for one call of the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.spec import TensorSpec

RUN_ELEMENTS = 1 << 23
"""Elements that one task handles: 16 MB of bf16, a few milliseconds."""

CALL_ELEMENTS = 1 << 20
"""Elements read, quantized and written at a time: enough to make the calls' own cost small, and
few enough for a core's share of the last cache."""

Span = tuple[int, int]


def runs(weight: TensorSpec, quantum: int = 1) -> Iterator[Span]:
    """Spans of rows that are worth a task of their own; each starts at a multiple of `quantum`."""
    return _spans((0, weight.shape[0]), weight.shape[1], RUN_ELEMENTS, quantum)


def blocks(
    run: Span, weight: TensorSpec, quantum: int = 1, elements: int | None = None
) -> Iterator[Span]:
    """The spans of rows of a run that are handled at a time, of about `elements`."""
    return _spans(run, weight.shape[1], elements or CALL_ELEMENTS, quantum)


def _spans(rows: Span, columns: int, elements: int, quantum: int) -> Iterator[Span]:
    step = max(elements // (columns * quantum), 1) * quantum
    for start in range(*rows, step):
        yield start, min(start + step, rows[1])
