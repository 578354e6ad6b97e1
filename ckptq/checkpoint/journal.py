"""A run that can be killed at any moment: what it has done, and what its output is proved by.

    {"run": fingerprint}                    what the output depends on
    {"done": {unit: {tensor: pieces}}}      bytes that are on the disk, with their digests
    {"publishing": {file: digest}}          all shards are; these are the other files

A unit is journalled only after its bytes are on the disk, and trusted only when its digests prove
it (`ckptq.checkpoint.proof`). A unit's bytes do not depend on when or by whom they are made, so
doing one again is harmless, and the result is the same to the byte. The output is published by one
rename, to a name that nothing has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.partial import JOURNAL, claim, discard, made_by_runs, partial_of, remove
from ckptq.checkpoint.proof import Pieces, Promise, digests, proven_keys
from ckptq.errors import MachineError, UsageError
from ckptq.files import machine_errors, rename_new, sync_folder

if TYPE_CHECKING:
    from ckptq.checkpoint.read import Files
    from ckptq.checkpoint.write import Shards

Fingerprint = Mapping[str, Any]
"""What the output depends on, as JSON data: source, recipe, arguments, versions."""


@dataclass(slots=True)
class Said:
    """What a journal says."""

    run: Fingerprint | None = None
    done: dict[str, Pieces] = field(default_factory=dict)
    published: dict[str, str] | None = None
    """The files beside the shards, when all was ready for the rename."""


class Journal:
    """One output in the making. Use `Journal.open`, then `done`, `record`, `publish`, `close`."""

    def __init__(self, out: Path, lock: int, said: Said, renamed: bool) -> None:
        self.out = out
        self.partial = partial_of(out)
        self.scratch = self.partial / "checkpoint"
        self.calibration = self.partial / "calibration"
        self.done = said.done
        """What the journal says; the files have to prove it."""
        self.renamed = renamed
        """A former run has come to the rename, by the journal, and died before it had cleaned up:
        `out` is there. `prove_renamed` says whether it is that."""
        self._published = said.published
        self._lock = lock

    @classmethod
    def open(cls, out: Path, fingerprint: Fingerprint, *, restart: bool = False) -> Journal:
        """Begin a run on `out`, or go on with the one that an identical command left behind.

        UsageError if the output exists, another run holds it, the folder in which it is made is not
        a run's, or the journal is of a different run that has done something: one that failed
        before that is in nobody's way.
        """
        partial = partial_of(out) if out.name else out  # the current folder, or the root
        if os.path.lexists(out) and not (partial / JOURNAL).exists():
            raise _taken(out)
        lock = claim(partial)
        try:
            said, renamed = _begin(out, partial, json.loads(json.dumps(fingerprint)), restart)
        except BaseException:
            if not (partial / JOURNAL).exists() and not made_by_runs(partial):
                with suppress(MachineError):
                    remove(partial)
            os.close(lock)
            raise
        return cls(out, lock, said, renamed)

    def record(self, done: Mapping[str, Pieces]) -> None:
        """These units' bytes are on the disk."""
        _append(self.partial / JOURNAL, {"done": done})
        self.done.update(done)

    def publish(self, shards: Iterable[str], documents: Iterable[str]) -> None:
        """The scratch folder becomes the output, at once and whole; these are its files.

        UsageError where somebody has put a file into it, or has taken the output's name.
        """
        if not self.renamed:
            documents = set(documents)
            self._check_files({*shards, *documents})
            for folder, _, _ in os.walk(self.scratch):
                sync_folder(Path(folder))
            proofs = digests(self.scratch, documents)
            _append(self.partial / JOURNAL, {"publishing": proofs})
            self._rename()
        remove(self.partial)

    def prove_renamed(
        self,
        shards: Shards,
        promises: Collection[Promise],
        files: Files,
        pool: ThreadPoolExecutor,
    ) -> None:
        """UsageError unless every byte of a renamed output is as it was written."""
        documents = self._published or {}
        found = digests(self.out, documents)
        wrong = [name for name, digest in documents.items() if found.get(name) != digest]
        wrong += [shard for shard in shards.sizes if not shards.intact(shard)]
        if not wrong:
            proved = proven_keys(promises, self.done, shards, files, pool)
            wrong = [promise.key for promise in promises if promise.key not in proved]
        if wrong:
            raise self._not_ours(wrong[0])

    def _not_ours(self, what: str) -> UsageError:
        """The output's name is taken by something that this run did not write."""
        return UsageError(
            f"{self.out}: is there, and is not what the run in {self.partial} wrote: {what} "
            "differs; move it away and give the same command, or remove the folder of the run"
        )

    def _check_files(self, wanted: set[str]) -> None:
        held = {
            str(p.relative_to(self.scratch))
            for p in self.scratch.rglob("*")
            if p.is_symlink() or not p.is_dir()
        }
        for name in sorted(held - wanted):
            raise UsageError(
                f"{self.scratch / name}: was not written by this run; move it away, and give the "
                "same command again"
            )
        for name in sorted(wanted - held):
            raise MachineError(f"{self.scratch / name}: was written, and is gone")

    def _rename(self) -> None:
        try:
            with machine_errors(self.out):
                rename_new(self.scratch, self.out)
        except MachineError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise _taken(self.out, self.partial) from error
            raise
        sync_folder(self.out.parent)

    def close(self) -> None:
        os.close(self._lock)


def check_apart(source: Path, out: Path) -> None:
    """UsageError for an output inside its source: it would be among the files that are copied."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies inside the source {source}; choose an output outside it")


def _taken(out: Path, partial: Path | None = None) -> UsageError:
    if partial is None:
        return UsageError(f"{out}: exists already; remove it, or choose another output")
    return UsageError(
        f"{out}: exists already, and was not made by the run in {partial}, which keeps what it has "
        "done; move it away, and the same command goes on"
    )


def _begin(out: Path, partial: Path, fingerprint: Fingerprint, restart: bool) -> tuple[Said, bool]:
    """What has been done, and whether it is the output already; the folder is ready for more."""
    file = partial / JOURNAL
    if restart and os.path.lexists(out):  # before the journal is read, which may be damaged
        raise _taken(out, partial)
    if restart:
        discard(partial)
    said = _read(file)
    renamed = False
    if os.path.lexists(out):
        if said.published is None or (partial / "checkpoint").exists():
            raise _taken(out, partial)
        renamed = True
    works = bool(said.done) or _holds_work(partial)
    if said.run is None and works:
        raise UsageError(
            f"{partial}: holds the work of another command, or its journal is gone; --restart "
            "begins anew"
        )
    if said.run is None or (said.run != fingerprint and not works):
        discard(partial)
        _append(file, {"run": fingerprint})
        sync_folder(partial)
        said = Said(run=fingerprint)
    elif said.run != fingerprint:
        raise UsageError(
            f"{partial}: was begun by a different run: {_difference(said.run, fingerprint)}; "
            "give the same command to go on, or --restart to begin anew"
        )
    if not renamed:
        with machine_errors(partial):
            (partial / "checkpoint").mkdir(exist_ok=True)
    return said, renamed


def _holds_work(partial: Path) -> bool:
    """Whether there is more than a run leaves that has just begun: layers that are calibrated, or
    the result of another tool."""
    work = (partial / "calibration", partial / "oneshot")
    files = (path for folder in work for path in folder.rglob("*") if path.is_file())
    return any(path != partial / "calibration" / "run.json" for path in files)


def _append(file: Path, line: Mapping[str, Any]) -> None:
    with machine_errors(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            rest = memoryview((json.dumps(line, sort_keys=True) + "\n").encode())
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(file: Path) -> Said:
    """A journal, or nothing where there is none.

    A last line without its end was being written when the run died; what it says was not recorded.
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
            f"{file}: the journal is damaged ({error}); --restart begins anew"
        ) from error
    return said


def _hear(said: Said, line: Mapping[str, Any]) -> None:
    """Take up what one line says."""
    if said.run is None:
        said.run = dict(line["run"])
    said.done.update(line.get("done", {}))
    if "publishing" in line:
        said.published = dict(line["publishing"])


def _difference(before: Fingerprint, now: Fingerprint, path: str = "") -> str:
    """The first field in which two fingerprints differ, with both values."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old != new:
            name = f"{path}{key}"
            if isinstance(old, dict) and isinstance(new, dict):
                return _difference(old, new, name + ".")
            return f"{name} was {_short(old)}, is {_short(new)}"
    return "nothing that can be named"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
