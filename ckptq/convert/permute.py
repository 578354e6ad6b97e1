"""`ckptq permute` as one call: rewrite a checkpoint with q/k in the other RoPE order.

Every tensor is a unit, copied or read in the new order; shards keep their tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint.beside import told_of
from ckptq.checkpoint.open import CONFIG, Checkpoint, open_checkpoint
from ckptq.checkpoint.side_files import render_json
from ckptq.convert.documents import run_record
from ckptq.convert.output import DEFAULTS, METADATA, Job, RunOptions, write_output
from ckptq.convert.preflight import check_disk, slab_rooms
from ckptq.permute import marks
from ckptq.permute.effect import Part
from ckptq.plan.rope import ALL, plan_permute
from ckptq.progress import Begin, Note, silent, untold
from ckptq.rope_order import RopeOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class PermuteRequest:
    """Which checkpoint gets which order, and where the result goes."""

    model: str | Path
    out: Path
    to: RopeOrder
    only: Collection[Part] = ALL
    revision: str | None = None
    options: RunOptions = DEFAULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Permuted:
    """What was done: how many tensors of each part moved, and the marks that say so."""

    out: Path
    moved: Mapping[Part, int]
    copied: int
    nbytes: int
    mark: str


def permute(request: PermuteRequest, begin: Begin = silent, note: Note = untold) -> Permuted:
    """Write the permuted checkpoint to `request.out`, a folder that must not exist yet.

    An interrupted run resumes when called again with the same request. UsageError if a part is
    already in the requested order or nothing would move, SourceError for contradictory marks,
    PlanError for a tensor that cannot be permuted.
    """
    ckpt = open_checkpoint(request.model, request.revision)
    plan = plan_permute(ckpt, request.to, request.only)
    for line in told_of(ckpt.path, ckpt.beside()):
        note(line)
    workers = request.options.threads
    units = [unit for units in plan.shards.values() for unit in units]
    check_disk(ckpt.nbytes, request.out, ckpt.side_bytes())
    config = marks.marked_config(ckpt.config, plan.order.marks)
    job = Job(
        name="permute",
        shards=plan.shards,
        marks=plan.order.marks,
        metadata=shared_metadata(ckpt),
        documents={CONFIG: render_json(ckpt.path / CONFIG, config)},
        workers=workers,
        rooms=slab_rooms(units, request.options.max_ram, workers),
    )
    arguments = {"to": str(request.to), "only": sorted(request.only)}
    record = run_record(ckpt, {"command": "permute", **arguments})
    restart = request.options.restart
    write_output(ckpt, request.out, record, lambda _: job, restart=restart, begin=begin, note=note)
    moved = plan.moved
    return Permuted(
        out=request.out,
        moved=moved,
        copied=len(ckpt.tensors) - sum(moved.values()),
        nbytes=ckpt.nbytes,
        mark=marks.dump(plan.order.marks),
    )


def shared_metadata(ckpt: Checkpoint) -> dict[str, str]:
    """The metadata in which all shards of the source agree."""
    first, *rest = (header.metadata for header in ckpt.headers)
    return METADATA | {k: v for k, v in first.items() if all(m.get(k) == v for m in rest)}
