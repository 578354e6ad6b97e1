"""Fill a run's shards: prove what is done already, do the rest, journal it.

Nothing that a journal says is trusted before the files prove it: a unit that is not as it was
written is done again.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.checkpoint.journal import Journal
from ckptq.checkpoint.proof import Promise, proven_keys
from ckptq.checkpoint.read import Files
from ckptq.checkpoint.write import Shards
from ckptq.errors import UsageError
from ckptq.permute.marks import marked_metadata
from ckptq.plan.unit import Plan, Unit
from ckptq.progress import Note, Report, untold
from ckptq.spec import TensorSpec, spec_of

if TYPE_CHECKING:
    from torch import Tensor

    from ckptq.calibrate.scales import Scales

METADATA = {"format": "pt"}

COMMIT_BYTES = 1 << 28
"""As much work as a killed run may lose: a second or less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be written, where, and with what."""

    plan: Plan
    journal: Journal
    workers: int
    rooms: tuple[int, int] = (0, 0)
    """Bytes of a room for slabs, and how many there are."""
    commit_bytes: int = COMMIT_BYTES
    device: str | None = None
    source_lasts: bool = True
    """Whether what is copied can be held against its source when the run goes on."""

    @property
    def specs(self) -> dict[str, dict[str, TensorSpec]]:
        """Shard -> the tensors in it."""
        return {shard: _specs(units) for shard, units in self.plan.shards.items()}

    def shards(self) -> Shards:
        """The files; of an output that is renamed already, to be read alone."""
        marks, renamed = self.plan.marks, self.journal.renamed
        return Shards(
            self.journal.out if renamed else self.journal.scratch,
            self.specs,
            marked_metadata(METADATA, marks) if marks else METADATA,
            finished=renamed,
        )

    def promises(self) -> list[Promise]:
        """What each unit is proved by."""
        return [
            Promise(
                key=unit.key,
                tensors=tuple(unit.writes),
                copies=unit.copies if self.source_lasts else {},
            )
            for unit in self.plan.units
        ]


def prove_renamed(job: Job) -> int:
    """UsageError unless the output is what this run wrote; the number of its units."""
    shards = job.shards()
    try:
        with Files() as files, ThreadPoolExecutor(job.workers, "ckptq-prove") as pool:
            job.journal.prove_renamed(shards, job.promises(), files, pool)
    finally:
        shards.close()
    return len(job.plan.units)


def convert_plan(job: Job, scales: Scales | None, report: Report, note: Note = untold) -> int:
    """Fill the journal's scratch folder with the plan's shards; how many units were done before."""
    from ckptq.convert.arithmetic import arithmetic_on
    from ckptq.convert.pipeline import Ends, convert
    from ckptq.convert.pipeline import workers as make_pool
    from ckptq.convert.schedule import Committer, Schedule
    from ckptq.convert.slabs import Slabs

    tensors = scale_tensors(job.plan, scales)
    arithmetic = arithmetic_on(job.device, job.workers)
    shards = job.shards()
    pool = make_pool(job.workers)
    try:
        with Files() as files:
            proved = proven_keys(job.promises(), job.journal.done, shards, files, pool)
            _tell(job, proved, note)
            ends = Ends(
                files=files,
                scales=tensors,
                shards=shards,
                slabs=Slabs(*job.rooms),
                source_lasts=job.source_lasts,
                arithmetic=arithmetic,
            )
            committer = Committer(job.journal, shards, _shard_of(job.plan), files, job.commit_bytes)

            def finished(unit: Unit) -> None:
                committer.finished(unit)
                report(unit.key, unit.read_bytes)

            try:
                schedule = Schedule(pool, max_tasks=8 * job.workers)
                convert(_left(job.plan, proved, report), ends, schedule, finished)
                committer.flush()
            finally:
                pool.shutdown(cancel_futures=True)
                committer.close()
    finally:
        pool.shutdown()
        shards.close()
    return len(proved)


def _tell(job: Job, proved: set[str], note: Note) -> None:
    """Say so where the files are not what the journal says."""
    lost = len(job.journal.done) - len(proved)
    if lost:
        note(
            f"{job.journal.scratch}: {lost} unit{'' if lost == 1 else 's'} of those that were done "
            "are not on the disk as they were written; done again"
        )


def _left(plan: Plan, proved: set[str], report: Report) -> list[Unit]:
    todo = []
    for unit in plan.units:
        if unit.key in proved:
            report(unit.key, unit.read_bytes)
        else:
            todo.append(unit)
    return todo


def _shard_of(plan: Plan) -> dict[str, str]:
    return {unit.key: shard for shard, units in plan.shards.items() for unit in units}


def _specs(units: tuple[Unit, ...]) -> dict[str, TensorSpec]:
    return {name: spec for unit in units for name, spec in unit.writes.items()}


def scale_tensors(plan: Plan, scales: Scales | None) -> dict[str, Tensor]:
    """The calibrated tensors that the plan promises; UsageError where they are not those."""
    wanted = {name: spec for unit in plan.units for name, spec in unit.scales.items()}
    found: Mapping[str, Tensor] = scales.tensors if scales is not None else {}
    for name, spec in wanted.items():
        if name not in found:
            raise UsageError(
                f"{_origin(scales)}: {name} is missing; they are of another model or scheme"
            )
        got = spec_of(found[name])
        if got != spec:
            raise UsageError(
                f"{_origin(scales)}: {name} is {got}, wanted {spec} for {plan.recipe.name}"
            )
    return {name: found[name] for name in wanted}


def _origin(scales: Scales | None) -> str:
    if scales is None:
        return "scales"
    shared = {"attn_head": ", a scale per head", "tensor": ", a scale per layer"}
    return f"the scales of {scales.made.model}{shared.get(scales.made.strategy or '', '')}"
