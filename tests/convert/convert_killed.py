"""One conversion in a process of its own, which kills itself at a given step.

A step is a call that changes the disk, on whichever thread makes it. The process is forked from a
server that has done its imports, so that a run takes a fraction of a second.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hub_server
from tiny.forked import SECONDS, process, server

from ckptq.checkpoint import journal
from ckptq.checkpoint.hub.upload import Destination
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.convert import blocks, output
from ckptq.convert.division.parts import Part
from ckptq.convert.output import RunOptions
from ckptq.convert.run import Result, write_quantized
from ckptq.plan.make import make_plan
from ckptq.progress import Note, untold
from ckptq.recipes.scheme import Recipe

STEPS = ("pwrite", "write", "copy_file_range", "ftruncate", "fsync", "rename", "replace")
STEPS += ("unlink", "rmdir")
"""Functions of `os` that change the disk; the rename that publishes is one more, "rename_new"."""

INTERRUPTED = 130

Scales = Callable[[Checkpoint], Any]
"""Makes the ScalesSource of a run; a function of a module, because it goes to another process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What to convert, and when to die: `by` is sent before step `die_at` of the kind `die_in` (of
    any kind) is done."""

    source: Path | str
    out: Path
    recipe: Recipe
    scales: Scales | None = None
    die_at: int | None = None
    die_in: str | None = None
    by: int = signal.SIGKILL
    workers: int = 3
    shard_bytes: int = 100_000
    part: Part | None = None
    join: bool = False
    hub: tuple[str, Path] | None = None
    """The address of a hub and a cache; a source that is no folder is streamed from there."""
    push: Destination | None = None
    token: str | None = None
    """The hub's; processes have the environment of the first that was forked."""


def perform(run: Run, begun: Callable[[int], None] = int) -> tuple[int, int]:
    """The exit code of the process, negative for a signal, and how many steps it had begun. `begun`
    gets its number."""
    count = server.Value("i", 0)
    forked = process(_main, run, count)
    forked.start()
    begun(forked.pid or 0)
    forked.join(SECONDS)
    assert forked.exitcode is not None, f"{run} hangs"
    return forked.exitcode, count.value


def _main(run: Run, count: Any) -> None:
    _count_steps(run, count)
    blocks.RUN_ELEMENTS, blocks.CALL_ELEMENTS = 1 << 13, 1 << 12
    output.COMMIT_BYTES = 20_000
    if run.hub is not None:
        hub_server.use(*run.hub)
    if run.token is not None:
        os.environ["HF_TOKEN"] = run.token
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        convert(run)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def convert(run: Run, note: Note = untold) -> Result:
    """The same in this process, to its end."""
    ckpt = open_checkpoint(run.source, stream=isinstance(run.source, str))
    return write_quantized(
        ckpt,
        make_plan(ckpt, run.recipe, shard_bytes=run.shard_bytes),
        run.out,
        arguments={},
        scales=run.scales(ckpt) if run.scales is not None else None,
        options=RunOptions(workers=run.workers, part=run.part, join=run.join, push=run.push),
        note=note,
    )


def _count_steps(run: Run, count: Any) -> None:
    lock = threading.Lock()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                count.value += run.die_in in (None, name)
                if count.value == run.die_at and run.die_in in (None, name):
                    os.kill(os.getpid(), run.by)
            return function(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))
    journal.rename_new = counted("rename_new", journal.rename_new)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
