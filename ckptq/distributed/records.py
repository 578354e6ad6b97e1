"""What a run has written down, line by line; of several ranks each in a file of its own.

    {"run": fingerprint}                    what the output depends on
    {"done": {unit: {tensor: pieces}}}      bytes that are on the disk, with their digests
    {"publishing": {file: digest}}          all shards are done; these are the other files

Rank 0 has the journal, each other one a file beside it, `ranks/3.jsonl`. Whoever opens the journal
next takes over what these say, so that any number of processes can go on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptq.errors import MachineError
from ckptq.files import machine_errors

JOURNAL = "journal.jsonl"

RANKS = "ranks"

Fingerprint = Mapping[str, Any]
"""What the output depends on, as JSON data: source, recipe, arguments, versions."""


@dataclass(slots=True)
class Said:
    """The contents of a journal."""

    run: Fingerprint | None = None
    done: dict[str, Any] = field(default_factory=dict)
    published: dict[str, str] | None = None
    """The files beside the shards, once everything was ready for the rename."""


def take_over(partial: Path, run: Fingerprint | None) -> dict[str, Any]:
    """Move what the ranks of this run have recorded into its journal; may be repeated after a
    kill."""
    done: dict[str, Any] = {}
    for file in sorted((partial / RANKS).glob("*.jsonl")) if run is not None else ():
        said = read_records(file)
        done |= said.done if said.run == run else {}
    if done:
        append(partial / JOURNAL, {"done": done})
    if run is not None and (partial / RANKS).exists():
        with machine_errors(partial):
            shutil.rmtree(partial / RANKS)
    return done


def append(file: Path, line: Mapping[str, Any]) -> None:
    with machine_errors(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            rest = memoryview((json.dumps(line, sort_keys=True) + "\n").encode())
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_records(file: Path) -> Said:
    """A journal, empty if there is none.

    An incomplete last line was being written when the run died, and does not count.
    """
    with machine_errors(file):
        try:
            text = file.read_bytes()
        except FileNotFoundError:
            return Said()
        whole, _, torn = text.rpartition(b"\n")
        if torn:
            os.truncate(file, len(text) - len(torn))
    said = Said()
    try:
        for line in whole.splitlines():
            _hear(said, json.loads(line))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise MachineError(
            f"{file}: the journal is damaged ({error}); --restart starts over"
        ) from error
    return said


def _hear(said: Said, line: Mapping[str, Any]) -> None:
    """Apply one line."""
    if said.run is None:
        said.run = dict(line["run"])
    said.done.update(line.get("done", {}))
    if "publishing" in line:
        said.published = dict(line["publishing"])
