"""The only place that prints: results to stdout, progress and errors to stderr.

Results are dataclasses; `--json` prints them as data, otherwise a table or a few lines are shown.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from ckptq.errors import CkptqError, ToldElsewhere
from ckptq.printable import printable, printable_lines, size
from ckptq.progress import Begin, Report

PIPE_COLUMNS = 10_000

PLAIN_SECONDS = 5.0
"""Seconds between lines of progress if stderr is not a terminal."""


def to_data(value: Any) -> Any:
    """A result as JSON data: dataclasses become objects, paths strings."""
    if hasattr(value, "to_dict"):
        return to_data(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def show_json(value: Any) -> None:
    """In ASCII, whatever encoding and terminal are in between."""
    sys.stdout.write(json.dumps(to_data(value), indent=2) + "\n")


def show_lines(*lines: str) -> None:
    """Each stays on one line, whatever a checkpoint put into it."""
    sys.stdout.write("\n".join(map(printable, lines)) + "\n")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout, numbers right-aligned. Never cut: a pipe gets whole names."""
    from rich.console import Console
    from rich.table import Table

    if title:
        show_lines(title)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)


def _cell(value: object) -> str:
    from rich.markup import escape

    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(printable(str(value)))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def note(message: str) -> None:
    """One line to stderr."""
    sys.stderr.write(printable(message) + "\n")


def complain(error: CkptqError) -> int:
    """Show a user's error, unless another process does, and return its exit code."""
    if not isinstance(error, ToldElsewhere):
        sys.stderr.write(f"error: {printable_lines(str(error))}\n")
    return error.exit_code


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """With `wanted` nothing that is printed in the block is seen."""
    if not wanted:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def progress() -> Iterator[Begin]:
    """Tasks with rate and time left on stderr: bars on a terminal, lines now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[what]}", markup=False)]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def begin(task: str, total: int, unit: str = "bytes") -> Report:
            meter = Meter(total, unit)
            row = bars.add_task(task, total=total, what="", amount="")

            def report(what: str, done: int) -> None:
                meter.add(done)
                bars.update(row, advance=done, what=what, amount=meter.amount())

            return report

        yield begin


class Meter:
    """How much of a task is done, its rate, and the time left."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit
        self.done, self.began = 0, time.monotonic()

    def add(self, done: int) -> None:
        self.done += done

    @property
    def elapsed(self) -> float:
        return max(time.monotonic() - self.began, 1e-6)

    def amount(self) -> str:
        if self.unit != "bytes":
            return f"{self.done} of {self.total} {self.unit}"
        return f"{size(self.done)} of {size(self.total)}, {size(self.done / self.elapsed)}/s"

    def seconds_left(self) -> float:
        return max(self.total - self.done, 0) * self.elapsed / max(self.done, 1)


class _Lines:
    """Progress for logs: a line at intervals, and one at the end."""

    def __init__(self, task: str, total: int, unit: str = "bytes") -> None:
        self.task, self.meter = task, Meter(total, unit)
        self.written = time.monotonic()

    def __call__(self, what: str, done: int) -> None:
        self.meter.add(done)
        now = time.monotonic()
        if now - self.written >= PLAIN_SECONDS or self.meter.done >= self.meter.total:
            self.written = now
            left = f"{self.meter.seconds_left():.0f} s left"
            note(f"{self.task}: {self.meter.amount()}, {left} ({what})")
