"""A conversion divided among jobs that know nothing of each other, on a file system they share.

`--part 3/16` is a run of its own, with its journal and its lock, that fills every 16th shard. Its
result is the folder OUT.part-3-of-16: the shards, and part.json with what they depend on and the
digests of their units. `--join` moves all of them into the working folder of an ordinary run, whose
journal then says that everything is done: it proves that, and publishes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ckptq.checkpoint.identity import difference
from ckptq.checkpoint.journal import Journal
from ckptq.checkpoint.partial import partial_of
from ckptq.errors import SourceError, UsageError
from ckptq.files import json_bytes, machine_errors, reading_errors, sync_folder, write_whole
from ckptq.plan.unit import Unit

RECORD = "part.json"

Shard = TypeVar("Shard")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the parts, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @staticmethod
    def parse(text: str) -> Part:
        """ "3/16"; UsageError for anything else."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
        if not 1 <= part.number <= part.of:
            raise UsageError(f"--part {text!r}: expected a part and their number, as 3/16")
        return part

    def folder(self, out: Path) -> Path:
        """Where its result is until it is joined."""
        return out.with_name(f"{out.name}.part-{self.number}-of-{self.of}")

    def share(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        """The shards that it fills."""
        return dict(list(shards.items())[self.number - 1 :: self.of])


def write_record(journal: Journal, depends: Mapping[str, Any]) -> list[str]:
    """Write what `gather` needs beside the shards of a part; its name."""
    data = json_bytes({"run": depends, "done": journal.done}, sort_keys=True)
    write_whole(journal.scratch / RECORD, data)
    return [RECORD]


def gather(
    journal: Journal, depends: Mapping[str, Any], shards: Mapping[str, tuple[Unit, ...]]
) -> None:
    """Move the shards of all parts into the journal's folder, and record their units as done.

    May be repeated after a kill. UsageError for a part that is missing, or that was made from
    another source or with other options.
    """
    out = journal.out
    begun = _parts_of(out)
    if not begun and not _all_done(shards, journal):
        raise UsageError(f"{out}: no part of it is here; run --part 1/N to N/N first")
    parts = [part for part in begun if _is_wanted(part, journal, shards)]
    wanted = json.loads(json.dumps(depends))
    done: dict[str, Any] = {}
    for part in parts:
        done |= _read(part, out, wanted)
    journal.record(done)
    for part in parts:
        for shard in part.share(shards):
            source = part.folder(out) / shard
            with machine_errors(source):
                if source.exists():
                    source.replace(journal.scratch / shard)
    sync_folder(journal.scratch)
    for part in begun:
        with suppress(OSError):
            (part.folder(out) / RECORD).unlink(missing_ok=True)
            part.folder(out).rmdir()


def _parts_of(out: Path) -> list[Part]:
    """All parts of the division that was begun; none if nothing of it is left."""
    name = re.compile(re.escape(out.name) + r"\.part-(\d+)-of-(\d+)(\.partial)?")
    folder = out.absolute().parent
    names = os.listdir(folder) if folder.is_dir() else []
    counts = {int(found[2]) for entry in names if (found := name.fullmatch(entry))}
    if len(counts) > 1:
        listed = " and ".join(map(str, sorted(counts)))
        raise UsageError(
            f"{out}: there are parts of divisions by {listed}; remove those of all but one"
        )
    return [Part(number, of) for of in counts for number in range(1, of + 1)]


def _is_wanted(part: Part, journal: Journal, shards: Mapping[str, tuple[Unit, ...]]) -> bool:
    """Whether it has to be read; it is gone when an interrupted join had taken it over.

    UsageError if it is missing.
    """
    folder = part.folder(journal.out)
    if (folder / RECORD).exists():
        return True
    if journal.done and _all_done(part.share(shards), journal):
        return False
    begun = partial_of(folder).exists()
    raise UsageError(
        f"{folder}: part {part} is {'not finished' if begun else 'missing'}; run the same command "
        f"with --part {part} in place of --join"
    )


def _all_done(shards: Mapping[str, tuple[Unit, ...]], journal: Journal) -> bool:
    return all(unit.key in journal.done for units in shards.values() for unit in units)


def _read(part: Part, out: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Its finished units."""
    file = part.folder(out) / RECORD
    try:
        with reading_errors(file):
            found = json.loads(file.read_bytes())
        run, done = dict(found["run"]), dict(found["done"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SourceError(f"{file}: damaged ({error}); run --part {part} again") from error
    if run != wanted:
        raise UsageError(
            f"{file}: part {part} was made by a different run: {difference(run, wanted)}; join "
            "with its options, or remove the folder and run it again"
        )
    return done
