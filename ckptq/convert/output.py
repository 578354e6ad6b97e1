"""The one writer: every command's output goes through it, shard by shard, whole or not at all.

Journal entries are checked against the files: a unit that differs from what was written is redone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ckptq.checkpoint.header import Header, StoredTensor
from ckptq.checkpoint.hub.upload import Destination, Upload
from ckptq.checkpoint.identity import check_unchanged, lasting
from ckptq.checkpoint.journal import Journal, check_free
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.partial import check_apart
from ckptq.checkpoint.proof import Promise, proven_keys, same_bytes
from ckptq.checkpoint.read import Files
from ckptq.checkpoint.side_files import write_side_files
from ckptq.checkpoint.write import Shards
from ckptq.convert.division.among_ranks import opened, share
from ckptq.convert.division.parts import Part, gather, write_record
from ckptq.distributed.ranks import ALONE, Ranks, cores
from ckptq.files import take_whole
from ckptq.permute.marks import Marks, marked_metadata
from ckptq.plan.unit import Unit
from ckptq.progress import Begin, Note, Report, silent, untold
from ckptq.spec import TensorSpec

METADATA = {"format": "pt"}

COMMIT_BYTES = 1 << 28
"""Bytes read or written between two journal entries, which a killed run may lose: at most a second
of work on a disk."""

MOST_WORKERS = 8
"""More threads are no faster because of the GIL; see ckptq.convert.arithmetic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How an output is made. None of this changes its content, except that scales calibrated on
    another device may differ."""

    workers: int | None = None
    """Threads of each process; None for one per core, at most MOST_WORKERS."""
    max_ram: int | None = None
    """Of each process."""
    device: str | None = None
    """Where weights are quantized and calibration runs the model; see `ckptq.device`."""
    restart: bool = False
    part: Part | None = None
    """Fill only the shards of this part."""
    join: bool = False
    """Take over what the parts have made, prove it and publish it."""
    push: Destination | None = None
    """Upload the output to the hub."""

    @property
    def threads(self) -> int:
        return self.workers or min(cores(), MOST_WORKERS)


DEFAULTS = RunOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to write, and how."""

    name: str
    """Name shown as progress: "quantize", "permute"."""
    shards: Mapping[str, tuple[Unit, ...]]
    marks: Marks
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)
    """Added to every shard, beside the marks."""
    whole: Mapping[str, Header] = field(default_factory=dict)
    """Shards of the source that go over as they are, by the names that they get: not written, but
    cloned or linked at the end."""
    documents: Mapping[str, bytes]
    """What is made for the output beside shards and index."""
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    made: Mapping[str, StoredTensor] = field(default_factory=dict)
    """What calibration has quantized, in files of the run's own."""
    workers: int
    device: str | None = "cpu"
    rooms: tuple[int, int] = (0, 0)
    """Bytes of a room for slabs, and how many there are."""
    source_lasts: bool = True
    """Whether copies can be compared with their source when the run resumes."""

    @property
    def units(self) -> list[Unit]:
        return [unit for units in self.shards.values() for unit in units]

    @property
    def specs(self) -> dict[str, dict[str, TensorSpec]]:
        """Shard that is written -> the tensors in it."""
        return {shard: _specs(units) for shard, units in self.shards.items()}

    @property
    def all_specs(self) -> dict[str, dict[str, TensorSpec]]:
        """The same for all shards."""
        whole = {
            shard: {name: tensor.spec for name, tensor in header.tensors.items()}
            for shard, header in self.whole.items()
        }
        return self.specs | whole

    def open_shards(self, journal: Journal) -> Shards:
        """The shard files; read-only for an output that is already renamed."""
        return Shards(
            journal.out if journal.renamed else journal.scratch,
            self.specs,
            marked_metadata(self.metadata, self.marks) if self.marks else self.metadata,
            finished=journal.renamed,
        )

    def promises(self) -> list[Promise]:
        """What proves each unit written."""
        return [
            Promise(
                key=unit.key,
                tensors=tuple(unit.writes),
                copies=unit.copies if self.source_lasts else {},
            )
            for unit in self.units
        ]


def write_output(
    ckpt: Checkpoint,
    out: Path,
    depends: Mapping[str, Any],
    prepare: Callable[[Journal], Job],
    *,
    linked: Collection[Path] = (),
    part: Part | None = None,
    join: bool = False,
    restart: bool = False,
    ranks: Ranks = ALONE,
    upload: Upload | None = None,
    begin: Begin = silent,
    note: Note = untold,
) -> int:
    """Do the job that `prepare` makes; `out` appears whole at the end, or not at all.

    An interrupted run resumes when called again with the same source and the same `depends` (what
    the output depends on, as JSON data), and gives identical bytes. `prepare` is called with the
    journal open and may keep its own state in the journal's folder. `linked` are the files of the
    source that the job takes whole. With `part`, the job has only the shards of that part, whose
    folder appears; with `join`, the parts' shards are taken over first. Of several `ranks` each
    fills some of the shards, and the first publishes. `upload` gets shards as they are finished;
    the run ends with it, and goes on with it when called again. Returns the number of units that
    were finished before.
    """
    pinned = ckpt.pinned()
    depends = {**depends, "modified": lasting(ckpt.path, pinned, linked)}
    if upload is not None:
        check_free(out)
        upload.begin()
    mine = {**depends, "part": str(part)} if part is not None else depends
    place = out if part is None else part.folder(out)

    def open_first() -> Journal:
        check_apart(ckpt.path, out)
        return Journal.open(place, mine, restart=restart)

    journal = opened(open_first, place, mine, ranks)
    try:
        with journal.gone_unless_kept() if ranks.leads else nullcontext():
            job = prepare(journal)
        if journal.renamed:
            resumed = ranks.led(lambda: _prove_renamed(job, journal))
        else:
            if join:
                gather(journal, depends, job.shards)
            resumed = sum(ranks.gathered(_fill_share(job, journal, ranks, begin, note, upload)))

        def finish() -> None:
            written: list[str] = []
            if not journal.renamed:
                journal.take_over()
                if part is not None:
                    written = write_record(journal, depends)
                else:
                    specs = job.all_specs
                    written = write_side_files(journal.scratch, ckpt, job.documents, specs, pinned)
            check_unchanged(pinned)
            if not journal.renamed:
                for shard, header in job.whole.items():
                    take_whole(header.file, journal.scratch / shard)
            if upload is None:
                journal.publish(job.all_specs, written)
            else:
                upload.stop()
                then = partial(upload.finish, journal.out, begin)
                journal.publish(job.all_specs, written, then)

        ranks.led(finish)
    finally:
        if upload is not None:
            upload.close()
        journal.close()
    return resumed


def _fill_share(
    job: Job, journal: Journal, ranks: Ranks, begin: Begin, note: Note, upload: Upload | None
) -> int:
    mine = replace(job, shards=share(job.shards, journal.done, ranks))
    total = sum(unit.read_bytes for unit in mine.units)
    among = f", 1 of {ranks.world} processes" if ranks.world > 1 else ""
    return _fill(mine, journal, begin(job.name + among, total), note, upload)


def _prove_renamed(job: Job, journal: Journal) -> int:
    """UsageError unless the output is what this run wrote; the number of its units."""
    for shard, header in job.whole.items():
        file = journal.out / shard
        if file.is_symlink() or not file.is_file() or not same_bytes(file, header.file):
            raise journal.not_ours(shard)
    shards = job.open_shards(journal)
    try:
        with Files() as files, ThreadPoolExecutor(job.workers, "ckptq-prove") as pool:
            journal.prove_renamed(shards, job.promises(), files, pool)
    finally:
        shards.close()
    return len(job.units)


def _fill(job: Job, journal: Journal, report: Report, note: Note, upload: Upload | None) -> int:
    """Fill the journal's scratch folder with the shards; how many units were done before."""
    from ckptq.convert.arithmetic import arithmetic_on
    from ckptq.convert.pipeline import Ends, convert
    from ckptq.convert.pipeline import workers as make_pool
    from ckptq.convert.schedule import Committer, Filled, Schedule
    from ckptq.convert.slabs import Slabs

    arithmetic = arithmetic_on(job.device, job.workers)
    shards = job.open_shards(journal)
    pool = make_pool(job.workers)
    try:
        with Files() as files:
            proved = proven_keys(job.promises(), journal.done, shards, files, pool)
            _tell(job, journal, proved, note)
            ends = Ends(
                files=files,
                scales=job.scales,
                made=job.made,
                shards=shards,
                slabs=Slabs(*job.rooms),
                source_lasts=job.source_lasts,
                arithmetic=arithmetic,
            )
            shard_of = _shard_of(job)
            filled = Filled(shard_of, lambda shard: _offer(journal.scratch / shard, upload))
            filled(proved)
            committer = Committer(journal, shards, shard_of, files, COMMIT_BYTES, filled)

            def finished(unit: Unit) -> None:
                committer.finished(unit)
                report(unit.key, unit.read_bytes)

            try:
                schedule = Schedule(pool, max_tasks=8 * job.workers)
                convert(_left(job, proved, report), ends, schedule, finished)
                committer.flush()
            finally:
                pool.shutdown(cancel_futures=True)
                committer.close()
    finally:
        pool.shutdown()
        shards.close()
    return len(proved)


def _offer(shard: Path, upload: Upload | None) -> None:
    if upload is not None:
        upload.offer(shard)


def _tell(job: Job, journal: Journal, proved: set[str], note: Note) -> None:
    """Report units that differ from the journal."""
    lost = sum(unit.key in journal.done for unit in job.units) - len(proved)
    if lost:
        note(
            f"{journal.scratch}: {lost} finished unit{'' if lost == 1 else 's'} on disk differ "
            "from what was written and will be redone"
        )


def _left(job: Job, proved: set[str], report: Report) -> list[Unit]:
    todo = []
    for unit in job.units:
        if unit.key in proved:
            report(unit.key, unit.read_bytes)
        else:
            todo.append(unit)
    return todo


def _shard_of(job: Job) -> dict[str, str]:
    return {unit.key: shard for shard, units in job.shards.items() for unit in units}


def _specs(units: tuple[Unit, ...]) -> dict[str, TensorSpec]:
    return {name: spec for unit in units for name, spec in unit.writes.items()}
