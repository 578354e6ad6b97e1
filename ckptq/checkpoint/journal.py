"""A run that can be killed at any moment: what is done, and how to prove it.

A unit is journalled only after its bytes are on the disk, and trusted only when its digests prove
it (`ckptq.checkpoint.proof`). A unit's bytes do not depend on when or where they are made, so
repeating it is harmless, and the result is byte-identical. The output is published by one
rename, to an unused name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.identity import difference
from ckptq.checkpoint.partial import (
    claim,
    discard,
    join,
    let_in,
    made_by_runs,
    outlived,
    partial_of,
    recover,
    remove,
)
from ckptq.checkpoint.proof import Pieces, Promise, digests, proven_keys
from ckptq.distributed.records import (
    JOURNAL,
    RANKS,
    Fingerprint,
    Said,
    append,
    read_records,
    take_over,
)
from ckptq.errors import MachineError, UsageError
from ckptq.files import machine_errors, rename_new, sync_folder

if TYPE_CHECKING:
    from ckptq.checkpoint.read import Files
    from ckptq.checkpoint.write import Shards


class Journal:
    """One output in the making. Use `Journal.open`, then `done`, `record`, `publish`, `close`."""

    def __init__(
        self, out: Path, lock: int, said: Said, renamed: bool, file: str = JOURNAL
    ) -> None:
        self.out = out
        self.partial = partial_of(out)
        self.scratch = self.partial / "checkpoint"
        self.calibration = self.partial / "calibration"
        self.done = said.done
        """What the journal says is done; the files have to prove it."""
        self.renamed = renamed
        """By the journal, an earlier run had reached the rename and died before cleaning up, and
        `out` exists. `prove_renamed` checks that it is that run's."""
        self._said = said
        self._lock = lock
        self._file = self.partial / file

    @classmethod
    def open(cls, out: Path, fingerprint: Fingerprint, *, restart: bool = False) -> Journal:
        """Begin a run on `out`, or resume the one that an identical command left behind.

        UsageError if the output exists, another run holds it, its working folder was not made by a
        run, or the journal belongs to a different run that has finished some work. A different
        run that had not is simply replaced.
        """
        check_free(out)
        partial = partial_of(out)
        lock = claim(partial)
        try:
            recover(partial, finished=os.path.lexists(out))
            said, renamed = _begin(out, partial, json.loads(json.dumps(fingerprint)), restart)
        except BaseException:
            if not (partial / JOURNAL).exists() and not made_by_runs(partial):
                with suppress(MachineError):
                    remove(partial)
            os.close(lock)
            raise
        return cls(out, lock, said, renamed)

    def let_others_in(self) -> tuple[Said, bool]:
        """Let the other ranks of this run in; what `beside` wants."""
        let_in(self._lock)
        with machine_errors(self.partial):
            (self.partial / RANKS).mkdir(exist_ok=True)
        return self._said, self.renamed

    @classmethod
    def beside(cls, out: Path, rank: int, said: Said, renamed: bool) -> Journal:
        """The journal of another rank of a run that the first has opened."""
        lock, file = join(partial_of(out)), f"{RANKS}/{rank}.jsonl"
        append(partial_of(out) / file, {"run": said.run})
        return cls(out, lock, said, renamed, file)

    @contextmanager
    def gone_unless_kept(self) -> Iterator[None]:
        """A run that fails in here leaves no folder behind, unless a later one can go on with what
        is in it: units, or what went before."""
        try:
            yield
        except BaseException:
            before = (self.calibration, self.partial / "oneshot")
            if not (self.done or self.renamed or any(map(_has_state, before))):
                with suppress(MachineError):
                    remove(self.partial)
            raise

    def record(self, done: Mapping[str, Pieces]) -> None:
        """Record that these units' bytes are on disk."""
        append(self._file, {"done": done})
        self.done.update(done)

    def take_over(self) -> None:
        """Record what other ranks have recorded, who do not go on."""
        self.done.update(take_over(self.partial, self._said.run))

    def publish(
        self, shards: Iterable[str], documents: Iterable[str], then: Callable[[], object] = list
    ) -> None:
        """Rename the scratch folder, which holds these files, to the output in one step. The run is
        not over before `then` has come back.

        UsageError if it holds other files, or if the output's name is taken.
        """
        if not self.renamed:
            documents = set(documents)
            self._check_files({*shards, *documents})
            for folder, _, _ in os.walk(self.scratch):
                sync_folder(Path(folder))
            proofs = digests(self.scratch, documents)
            append(self.partial / JOURNAL, {"publishing": proofs})
            self._rename()
        then()
        remove(self.partial)

    def prove_renamed(
        self,
        shards: Shards,
        promises: Collection[Promise],
        files: Files,
        pool: ThreadPoolExecutor,
    ) -> None:
        """UsageError unless a renamed output is byte for byte as it was written."""
        documents = self._said.published or {}
        found = digests(self.out, documents)
        wrong = [name for name, digest in documents.items() if found.get(name) != digest]
        wrong += [shard for shard in shards.sizes if not shards.intact(shard)]
        if not wrong:
            proved = proven_keys(promises, self.done, shards, files, pool)
            wrong = [promise.key for promise in promises if promise.key not in proved]
        if wrong:
            raise self.not_ours(wrong[0])

    def not_ours(self, what: str) -> UsageError:
        """The output's name is taken by something else."""
        return UsageError(
            f"{self.out}: not what the run in {self.partial} wrote: {what} differs; move it away "
            "and rerun the same command, or remove the run's folder"
        )

    def _check_files(self, wanted: set[str]) -> None:
        held = {
            str(p.relative_to(self.scratch))
            for p in self.scratch.rglob("*")
            if p.is_symlink() or not p.is_dir()
        }
        for name in sorted(held - wanted):
            raise UsageError(
                f"{self.scratch / name}: not written by this run; move it away and rerun the same "
                "command"
            )
        for name in sorted(wanted - held):
            raise MachineError(f"{self.scratch / name}: was written, but no longer exists")

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


def begun_source(partial: Path) -> Mapping[str, Any]:
    """The source of the run in this folder, as its fingerprint has it; empty where there is none.
    Nothing is locked or changed: what does not fit is found when the run resumes."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with (partial / JOURNAL).open() as file:
            found = json.loads(file.readline())["run"]["source"]
        return found if isinstance(found, dict) else {}
    return {}


def check_free(out: Path) -> None:
    """UsageError for an output that exists and is not that of a run which can be finished."""
    if out.name in ("", ".."):
        raise UsageError(f"{str(out)!r} is no name for an output; name a new folder")
    if os.path.lexists(out) and not outlived(partial_of(out)):
        raise _taken(out)


def _taken(out: Path, partial: Path | None = None) -> UsageError:
    if partial is None:
        return UsageError(f"{out}: already exists; remove it, or choose another output")
    return UsageError(
        f"{out}: already exists, but was not made by the run in {partial}, whose work is kept; "
        "move it away and rerun the same command to resume"
    )


def _has_state(folder: Path) -> bool:
    """Folders of layers, or a result; the description of a run alone is nothing to go on with."""
    return any(path.is_dir() or path.suffix == ".safetensors" for path in folder.rglob("*"))


def _begin(out: Path, partial: Path, fingerprint: Fingerprint, restart: bool) -> tuple[Said, bool]:
    """What is done, and whether the output is published already; prepares the folder for more."""
    file = partial / JOURNAL
    if restart and os.path.lexists(out):  # before the journal is read, which may be damaged
        raise _taken(out, partial)
    if restart:
        discard(partial)
    said = read_records(file)
    said.done.update(take_over(partial, said.run))
    renamed = False
    if os.path.lexists(out):
        if said.published is None or (partial / "checkpoint").exists():
            raise _taken(out, partial)
        renamed = True
    works = bool(said.done) or renamed or _holds_work(partial)
    if said.run is None and works:
        raise UsageError(
            f"{partial}: holds the work of another command, or has lost its journal; --restart "
            "starts over"
        )
    if said.run is None or (said.run != fingerprint and not works):
        discard(partial)
        append(file, {"run": fingerprint})
        sync_folder(partial)
        said = Said(run=fingerprint)
    elif said.run != fingerprint:
        raise UsageError(
            f"{partial}: started by a different run: {difference(said.run, fingerprint)}; rerun "
            "the same command to resume, or use --restart to start over"
        )
    if not renamed:
        with machine_errors(partial):
            (partial / "checkpoint").mkdir(exist_ok=True)
    return said, renamed


def _holds_work(partial: Path) -> bool:
    """Whether there is work worth keeping: calibrated layers, or the result of another tool."""
    work = (partial / "calibration", partial / "oneshot")
    files = (path for folder in work for path in folder.rglob("*") if path.is_file())
    return any(path != partial / "calibration" / "run.json" for path in files)
