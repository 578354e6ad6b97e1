"""`ckptq calibrate` as one call: write scales to their own file.

    SCALES.partial/lock            held by the run, and marks the folder as its own
    SCALES.partial/calibration/    state to resume a killed run (ckptq.calibrate.journal)

Each of several processes has its own locked folder there, such as rank-0-of-4. Everything is
removed once the file is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ckptq.calibrate.journal import holds_work
from ckptq.calibrate.ranks import Ranks, together
from ckptq.calibrate.request import CalibrationRequest, calibrate_plan
from ckptq.calibrate.scales import Scales, check_replaceable, save_scales
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.checkpoint.partial import JOURNAL, claim, discard, made_by_runs, partial_of, remove
from ckptq.errors import MachineError, UsageError
from ckptq.plan.make import make_plan
from ckptq.plan.match import refuse_holes
from ckptq.plan.unit import Plan
from ckptq.progress import Begin, Note, silent, untold
from ckptq.recipes.scheme import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalesRequest:
    """Which model's scales to write, and where."""

    model: str | Path
    recipe: Recipe
    output: Path
    revision: str | None = None
    text: CalibrationRequest = field(default_factory=CalibrationRequest)
    device: str | None = None
    """Where the model runs; see `ckptq.device`."""
    restart: bool = False


def calibrate_to_file(
    request: ScalesRequest, begin: Begin = silent, note: Note = untold
) -> Scales | None:
    """The scales that a recipe needs, written to `request.output` whole at the end, or not at all.

    An interrupted run resumes when called again with the same request, and gives identical bytes;
    `restart` discards its state. UsageError for different arguments, and if another run is writing
    the same file; SourceError for a source that lacks tensors.

    Under torchrun only the first process writes, prints and returns scales.
    """
    if request.recipe.runs_layers:
        raise UsageError(
            f"recipe {request.recipe.name!r} quantizes weights by their inputs; `ckptq quantize` "
            "calibrates its scales in the same pass"
        )
    ckpt = open_checkpoint(request.model, request.revision)
    plan = make_plan(ckpt, request.recipe)
    refuse_holes(ckpt, plan.layout)
    with together() as ranks:
        if not ranks.leads:
            begin, note = silent, untold
        if plan.attention is not None and plan.attention.told is not None:
            note(plan.attention.told)
        made = _calibrate(ckpt, plan, request, begin, note, ranks)
        return made if ranks.leads else None


def _calibrate(
    ckpt: Checkpoint, plan: Plan, request: ScalesRequest, begin: Begin, note: Note, ranks: Ranks
) -> Scales:
    check_replaceable(request.output)
    partial = partial_of(request.output)
    with _held(partial, ranks, request.restart) as folder:
        journal = folder / "calibration"
        made = calibrate_plan(ckpt, plan, request.text, request.device, begin, journal, ranks, note)
        if ranks.leads:
            save_scales(request.output, made, beside=partial)
        ranks.wait()
        if ranks.leads:
            remove(partial)
    return made


@contextmanager
def _held(partial: Path, ranks: Ranks, restart: bool) -> Iterator[Path]:
    """The folder of this process alone, empty for one that begins anew; gone where it ends before a
    state was kept."""
    with ExitStack() as locks:
        folder = partial
        locks.callback(os.close, claim(partial, shared=ranks.world > 1))
        if ranks.world > 1:
            folder = partial / f"rank-{ranks.rank}-of-{ranks.world}"
            locks.callback(os.close, claim(folder))
        if (partial / JOURNAL).exists():
            raise UsageError(
                f"{partial}: holds an unfinished run of another command; finish it or "
                "choose another output"
            )
        if restart:
            discard(folder)
        try:
            yield folder
        except BaseException:
            _leave(folder, partial)
            raise


def _leave(folder: Path, partial: Path) -> None:
    """Remove the folder of a run without saved state; other processes keep theirs."""
    with suppress(MachineError):  # others may be about the same
        if not holds_work(folder / "calibration"):
            remove(folder)
        if folder != partial and not made_by_runs(partial):
            remove(partial)
