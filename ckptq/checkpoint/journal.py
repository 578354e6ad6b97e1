"""A run that can be killed at any moment: its scratch folder, its lock, its journal.

    OUT.partial/lock            held by the run that is writing
    OUT.partial/journal.jsonl   a fingerprint of the run, then the keys of finished units
    OUT.partial/calibration/    what calibration needs to go on
    OUT.partial/checkpoint/     becomes OUT by one rename at the end

A key is journalled only after its bytes are on the disk. A unit's bytes do not depend on when or by
whom they are made, so doing one again is harmless, and the result is the same to the byte.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckptq.checkpoint.write import machine_errors, sync_folder
from ckptq.errors import MachineError, UsageError

Fingerprint = Mapping[str, Any]
"""What the output depends on, as JSON data: source, recipe, arguments, versions."""


class Journal:
    """One output in the making. Use `Journal.open`, then `done`, `record`, `publish`, `close`."""

    def __init__(self, out: Path, lock: int, done: set[str], published: bool) -> None:
        self.out = out
        self.partial = partial_of(out)
        self.scratch = self.partial / "checkpoint"
        self.calibration = self.partial / "calibration"
        self.done = done
        self.published = published
        """A former run got as far as the rename and died before it had cleaned up."""
        self._lock = lock

    @classmethod
    def open(cls, out: Path, fingerprint: Fingerprint, *, restart: bool = False) -> Journal:
        """Begin a run on `out`, or go on with the one that an identical command left behind.

        UsageError if the output exists, another run holds it, or the journal is of a different run
        that has done something: one that failed before that is in nobody's way.
        """
        if not out.name:  # the current folder, or the root
            raise _taken(out)
        partial = partial_of(out)
        if os.path.lexists(out) and not (partial / "journal.jsonl").exists():
            raise _taken(out)
        with machine_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
            lock = take_lock(partial)
        try:
            if restart:
                empty(partial)
            found, done, publishing = _read(partial / "journal.jsonl")
            if os.path.lexists(out) and not publishing:
                raise _taken(out)
            fingerprint = json.loads(json.dumps(fingerprint))
            if found is None or (found != fingerprint and not (done or _holds_work(partial))):
                empty(partial)
                (partial / "checkpoint").mkdir()
                _append(partial / "journal.jsonl", {"run": fingerprint})
                sync_folder(partial)
            elif found != fingerprint:
                raise UsageError(
                    f"{partial}: was begun by a different run: {_difference(found, fingerprint)}; "
                    "give the same command to go on, or --restart to begin anew"
                )
        except BaseException:
            os.close(lock)
            raise
        return cls(out, lock, done, published=out.exists())

    def record(self, keys: Iterable[str]) -> None:
        """These units' bytes are on the disk."""
        keys = list(keys)
        _append(self.partial / "journal.jsonl", {"done": keys})
        self.done.update(keys)

    def publish(self) -> None:
        """The scratch folder becomes the output, at once and whole."""
        if not self.published:
            for folder, _, _ in os.walk(self.scratch):
                sync_folder(Path(folder))
            _append(self.partial / "journal.jsonl", {"publishing": True})
            with machine_errors(self.out):
                os.rename(self.scratch, self.out)
            sync_folder(self.out.parent)
        with machine_errors(self.partial):
            _remove(self.partial)

    def close(self) -> None:
        os.close(self._lock)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _taken(out: Path) -> UsageError:
    return UsageError(f"{out}: exists already; remove it, or choose another output")


def check_apart(source: Path, out: Path) -> None:
    """UsageError for an output inside its source: it would be among the files that are copied."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies inside the source {source}; choose an output outside it")


def take_lock(partial: Path) -> int:
    """A descriptor that holds the folder until it is closed; UsageError where another run does."""
    descriptor = os.open(partial / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(f"{partial}: another run is writing this output right now") from error
    return descriptor


def _holds_work(partial: Path) -> bool:
    """Whether there is more than a run leaves that has just begun: layers that are calibrated, or
    the result of another tool."""
    files = (path for path in partial.rglob("*") if path.is_file())
    begun = {partial / "lock", partial / "journal.jsonl", partial / "calibration" / "run.json"}
    return any(p not in begun and not p.is_relative_to(partial / "checkpoint") for p in files)


def empty(partial: Path) -> None:
    """Everything but the lock, the journal first: without it the rest means nothing."""
    (partial / "journal.jsonl").unlink(missing_ok=True)
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _remove(partial: Path) -> None:
    """The journal goes when nothing but the lock is left: until then the same command ends this."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    (partial / "journal.jsonl").unlink()
    # a run that is just being refused may have put its own lock here
    shutil.rmtree(partial, ignore_errors=True)


def _append(file: Path, line: Mapping[str, Any]) -> None:
    with machine_errors(file), file.open("a") as handle:
        handle.write(json.dumps(line, sort_keys=True) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def _read(file: Path) -> tuple[dict[str, Any] | None, set[str], bool]:
    """(fingerprint, finished keys, whether the rename had begun) of a journal.

    A last line without its end was being written when the run died; what it says was not recorded.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return None, set(), False
    whole, _, torn = text.rpartition(b"\n")
    if torn:
        with machine_errors(file):
            os.truncate(file, len(text) - len(torn))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise MachineError(
            f"{file}: the journal is damaged ({error}); --restart begins anew"
        ) from error
    if not lines:
        return None, set(), False
    done = {key for line in lines[1:] for key in line.get("done", ())}
    return lines[0]["run"], done, any("publishing" in line for line in lines)


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
