"""`ckptq calibrate` as one call: write scales to their own file.

    SCALES.partial/lock            held by the run, and marks the folder as its own
    SCALES.partial/calibration/    state to resume a killed run (ckptq.calibrate.journal)

Everything is removed once the file is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ckptq.calibrate.journal import holds_work
from ckptq.calibrate.request import CalibrationRequest, calibrate_plan
from ckptq.calibrate.scales import Scales, check_replaceable, save_scales
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.checkpoint.partial import claim_together, discard, partial_of, remove
from ckptq.distributed.ranks import Ranks, together
from ckptq.distributed.records import JOURNAL
from ckptq.errors import MachineError, UsageError
from ckptq.models.unsound import refuse_unsound
from ckptq.plan.make import make_plan
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


def calibrate_to_file(request: ScalesRequest, begin: Begin = silent, note: Note = untold) -> Scales:
    """The scales that a recipe needs, written to `request.output` whole at the end, or not at all.

    An interrupted run resumes when called again with the same request, and gives identical bytes;
    `restart` discards its state. UsageError for different arguments, and if another run is writing
    the same file; SourceError for a source that lacks tensors.

    Under torchrun only the first process writes the file.
    """
    with together() as ranks:
        ckpt, plan = ranks.agreed(lambda: _opened(request))
        if plan.attention is not None and plan.attention.told is not None:
            note(plan.attention.told)
        partial = partial_of(request.output)
        with _held(partial, ranks, request) as journal:
            text, device = request.text, request.device
            made = calibrate_plan(ckpt, plan, text, device, begin, journal, ranks, note)
            ranks.led(lambda: _finish(request.output, made, partial))
        return made


def _opened(request: ScalesRequest) -> tuple[Checkpoint, Plan]:
    if request.recipe.runs_layers:
        raise UsageError(
            f"recipe {request.recipe.name!r} quantizes weights by their inputs; `ckptq quantize` "
            "calibrates its scales in the same pass"
        )
    ckpt = open_checkpoint(request.model, request.revision)
    plan = make_plan(ckpt, request.recipe)
    refuse_unsound(ckpt, plan.layout)
    check_replaceable(request.output)
    return ckpt, plan


def _finish(output: Path, made: Scales, partial: Path) -> None:
    save_scales(output, made, beside=partial)
    remove(partial)


@contextmanager
def _held(partial: Path, ranks: Ranks, request: ScalesRequest) -> Iterator[Path]:
    """Where the state is, empty for a run that begins anew; gone where it ends before one was
    kept."""
    lock = claim_together(partial, ranks)
    try:
        ranks.led(lambda: _begin(partial, request.restart))
        try:
            yield partial / "calibration"
        except BaseException:
            if ranks.leads:
                _leave(partial)
            raise
    finally:
        os.close(lock)


def _begin(partial: Path, restart: bool) -> None:
    if (partial / JOURNAL).exists():
        raise UsageError(
            f"{partial}: holds an unfinished run of another command; finish it or "
            "choose another output"
        )
    if restart:
        discard(partial)


def _leave(partial: Path) -> None:
    """Remove the folder of a run without saved state."""
    with suppress(MachineError):
        if not holds_work(partial / "calibration"):
            remove(partial)
