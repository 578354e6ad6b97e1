"""`ckptq permute`: a checkpoint becomes one in the other RoPE order, tensor by tensor.

Shards keep their tensors; whatever the permutation does not touch is copied inside the kernel. A
run that is killed goes on where it stopped (`ckptq.checkpoint.journal`).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ckptq import __version__
from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.identity import Identity, check_unchanged, lasting
from ckptq.checkpoint.journal import Journal, check_apart
from ckptq.checkpoint.open import CONFIG, SINGLE, Checkpoint
from ckptq.checkpoint.partial import partial_of
from ckptq.checkpoint.proof import Promise, proven_keys
from ckptq.checkpoint.read import Files, bytes_of, read_tensor
from ckptq.checkpoint.side_files import render_json, write_side_files
from ckptq.checkpoint.write import Shards
from ckptq.errors import MachineError, UsageError
from ckptq.models.family import family_of
from ckptq.permute import marks
from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Effect, Move, Part
from ckptq.permute.targets import plan_permutation
from ckptq.rope_order import RopeOrder
from ckptq.spec import TensorSpec

COMMIT_BYTES = 1 << 29
"""How much is written between two entries of the journal."""


Progress = Callable[[str, int], None]
"""(tensor, its bytes), called for each that is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PermutePlan:
    """What will be done, decided from headers and config."""

    ckpt: Checkpoint
    to: RopeOrder
    only: frozenset[Part]
    effects: Mapping[str, Effect]
    """Of every tensor of q/k and their attention modules; the others are copied."""
    marks: marks.Marks
    """What the new checkpoint is marked with."""

    @property
    def moved(self) -> dict[str, Effect]:
        """The tensors whose bytes change."""
        return {
            name: effect
            for name, effect in self.effects.items()
            if effect.move is not Move.KEPT and effect.part in self.only
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Permuted:
    """What was done: how many tensors of each part moved, and the marks that say so."""

    out: Path
    moved: Mapping[Part, int]
    copied: int
    nbytes: int
    mark: str


def plan_permute(
    ckpt: Checkpoint, to: RopeOrder, only: Collection[Part] = tuple(Part)
) -> PermutePlan:
    """Decide everything before a byte moves.

    Raises UsageError if a part is in order `to` already or nothing would move, SourceError for
    contradictory marks, PlanError for a tensor that cannot be permuted.
    """
    metadata = {header.file.name: header.metadata for header in ckpt.headers}
    family = RopeOrder(family_of(ckpt.config).rope)
    plan = PermutePlan(
        ckpt=ckpt,
        to=to,
        only=frozenset(only),
        effects=plan_permutation(ckpt),
        marks=marks.applied(marks.read(ckpt.config, metadata), to, only, family),
    )
    if not plan.moved:
        raise UsageError(
            f"{ckpt.path}: no {' or '.join(sorted(only))} of q/k are indexed by row; there is "
            "nothing to permute"
        )
    return plan


def permute_checkpoint(
    plan: PermutePlan,
    out: Path,
    *,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda name, nbytes: None,
) -> Permuted:
    """Write the permuted checkpoint to `out`, a folder that must not exist yet.

    An interrupted run goes on when it is called again with the same plan. Memory: two copies of
    the largest q/k tensor for each of `workers` threads (as many as cores, if not given).
    """
    check_apart(plan.ckpt.path, out)
    check_space(plan.ckpt, out)
    workers = workers or len(os.sched_getaffinity(0))
    pinned = plan.ckpt.pinned()
    _documents(plan)  # what cannot be written is found out now
    journal = Journal.open(out, fingerprint(plan, pinned), restart=restart)
    specs = shard_specs(plan.ckpt)
    try:
        written: list[str] = []
        if journal.renamed:
            _prove_renamed(plan, journal, workers)
        else:
            _fill(plan, journal, workers, progress)
            documents = _documents(plan)
            written = write_side_files(journal.scratch, plan.ckpt, documents, specs, pinned)
        check_unchanged(pinned)
        journal.publish(specs, written)
    finally:
        journal.close()
    moved = plan.moved
    return Permuted(
        out=out,
        moved=Counter(effect.part for effect in moved.values()),
        copied=len(plan.ckpt.tensors) - len(moved),
        nbytes=plan.ckpt.nbytes,
        mark=marks.dump(plan.marks),
    )


def check_space(ckpt: Checkpoint, out: Path) -> None:
    """Refuse at once what would fail after an hour."""
    parent = next(p for p in out.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{parent}: no permission to write here")
    free, needed = shutil.disk_usage(parent).free, ckpt.nbytes + ckpt.side_bytes()
    if free < needed and not partial_of(out).exists():
        raise MachineError(
            f"{parent}: too little disk: {out.name} needs {needed:,} bytes, {free:,} are free"
        )


def fingerprint(plan: PermutePlan, pinned: Mapping[Path, Identity]) -> dict[str, object]:
    """What the output depends on."""
    return {
        "command": "permute",
        "ckptq": __version__,
        "source": str(plan.ckpt.path.resolve()),
        "headers": {h.file.name: h.digest for h in plan.ckpt.headers},
        "files": lasting(plan.ckpt.path, pinned),
        "to": str(plan.to),
        "only": sorted(plan.only),
    }


def shard_specs(ckpt: Checkpoint) -> dict[str, dict[str, TensorSpec]]:
    """The source's own shards; a single one gets the name that every loader looks for."""
    named = {
        h.file.name: {name: tensor.spec for name, tensor in h.tensors.items()} for h in ckpt.headers
    }
    return named if len(named) > 1 else {SINGLE: next(iter(named.values()))}


def _fill(plan: PermutePlan, journal: Journal, workers: int, progress: Progress) -> None:
    moved = plan.moved
    shards = Shards(journal.scratch, shard_specs(plan.ckpt), _metadata(plan))
    try:
        with Files() as files, ThreadPoolExecutor(workers, "ckptq-permute") as pool:
            proved = proven_keys(_promises(plan), journal.done, shards, files, pool)
            for batch in _batches(plan.ckpt, proved, progress):
                tasks = [
                    partial(_move, t, moved.get(t.name), plan.to, files, shards) for t in batch
                ]
                for tensor in pool.map(lambda task: task(), tasks):
                    progress(tensor.name, tensor.nbytes)
                names = [tensor.name for tensor in batch]
                shards.check_complete(names)
                files.check_unchanged()
                shards.sync({shards.places[name].shard for name in names})
                journal.record({name: shards.pieces([name]) for name in names})
    finally:
        shards.close()


def _prove_renamed(plan: PermutePlan, journal: Journal, workers: int) -> None:
    shards = Shards(journal.out, shard_specs(plan.ckpt), _metadata(plan), finished=True)
    try:
        with Files() as files, ThreadPoolExecutor(workers, "ckptq-prove") as pool:
            journal.prove_renamed(shards, _promises(plan), files, pool)
    finally:
        shards.close()


def _promises(plan: PermutePlan) -> list[Promise]:
    """What each tensor is proved by: its source, or the digest of what was made of it."""
    moved = plan.moved
    return [
        Promise(key=name, tensors=(name,), copies={} if name in moved else {name: stored})
        for name, stored in plan.ckpt.tensors.items()
    ]


def _batches(
    ckpt: Checkpoint, done: Collection[str], progress: Progress
) -> Iterator[list[StoredTensor]]:
    """What is left to do, in runs of about COMMIT_BYTES."""
    batch: list[StoredTensor] = []
    room = COMMIT_BYTES
    for tensor in ckpt.tensors.values():
        if tensor.name in done:
            progress(tensor.name, tensor.nbytes)
            continue
        batch.append(tensor)
        room -= tensor.nbytes
        if room <= 0:
            yield batch
            batch, room = [], COMMIT_BYTES
    if batch:
        yield batch


def _move(
    stored: StoredTensor, effect: Effect | None, to: RopeOrder, files: Files, shards: Shards
) -> StoredTensor:
    """One tensor from its place in the source to its place in the output; None copies it."""
    if effect is None:
        shards.copy(stored.name, stored, files, 0, stored.nbytes)
    else:
        made = permute_tensor(read_tensor(stored, files), effect, to)
        shards.write(stored.name, 0, bytes_of(made.contiguous()))
    return stored


def _metadata(plan: PermutePlan) -> dict[str, str]:
    """What all shards of the source say alike, and the mark."""
    first, *rest = (h.metadata for h in plan.ckpt.headers)
    alike = {k: v for k, v in first.items() if all(m.get(k) == v for m in rest)}
    return marks.marked_metadata({"format": "pt", **alike}, plan.marks)


def _documents(plan: PermutePlan) -> dict[str, bytes]:
    config = marks.marked_config(plan.ckpt.config, plan.marks)
    return {CONFIG: render_json(plan.ckpt.path / CONFIG, config)}
