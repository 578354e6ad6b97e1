"""`ckptq calibrate`, as one function: scales in a file of their own.

    SCALES.partial/lock            held by the run
    SCALES.partial/calibration/    what a killed run needs to go on (ckptq.calibrate.journal)

Several processes have a folder each in there, rank-0-of-4 and so on. All of it is gone when the
file is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptq.calibrate.journal import holds_work
from ckptq.calibrate.ranks import ALONE, Ranks
from ckptq.calibrate.request import CalibrationRequest, calibrate_plan
from ckptq.calibrate.scales import Scales, save_scales
from ckptq.checkpoint.journal import empty, partial_of, take_lock
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.write import machine_errors
from ckptq.plan.unit import Plan
from ckptq.progress import Begin, Note, untold


def calibrate_to_file(
    ckpt: Checkpoint,
    plan: Plan,
    wanted: CalibrationRequest,
    output: Path,
    begin: Begin,
    *,
    restart: bool = False,
    ranks: Ranks = ALONE,
    note: Note = untold,
) -> Scales:
    """The scales that a plan needs, written to `output` whole at the end, or not at all.

    An interrupted run goes on when it is called again with the same arguments, and ends with equal
    bytes; `restart` discards what it has done. UsageError for different arguments, and where
    another run is writing the same file.
    """
    partial = partial_of(output)
    folder = partial if ranks.world == 1 else partial / f"rank-{ranks.rank}-of-{ranks.world}"
    with _held(folder, partial, restart):
        made = calibrate_plan(ckpt, plan, wanted, begin, folder / "calibration", ranks, note)
        if ranks.leads:
            with machine_errors(output):
                save_scales(output, made)
        ranks.wait()
    if ranks.leads:
        with machine_errors(partial):
            shutil.rmtree(partial)
    return made


@contextmanager
def _held(folder: Path, partial: Path, restart: bool) -> Iterator[None]:
    """The folder of this run alone, empty for one that begins anew; gone where it ends before a
    state was kept."""
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
    try:
        if restart:
            with machine_errors(folder):
                empty(folder)
        yield
    except BaseException:
        if not holds_work(folder / "calibration"):
            shutil.rmtree(folder)
            with suppress(OSError):  # gone already, or other processes have a folder in it
                partial.rmdir()
        raise
    finally:
        os.close(lock)
