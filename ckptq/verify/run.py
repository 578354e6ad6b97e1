"""`ckptq verify`, as one function. It opens the result as a stranger would."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.checkpoint.open import Checkpoint, Problems, open_checkpoint
from ckptq.errors import SourceError
from ckptq.verify.declared import read_declared
from ckptq.verify.report import Finding, Report
from ckptq.verify.structure import check_structure
from ckptq.verify.subject import Subject

if TYPE_CHECKING:
    from ckptq.verify.data import Checked

Progress = Callable[[str, int], None]
"""(what was checked, bytes of the checkpoint that are done since the last call)"""


def verify(
    path: str | Path,
    source: str | Path | None = None,
    *,
    fast: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check a finished compressed-tensors checkpoint, against its source where one is given.

    `fast` compares a first, a middle and a last run of rows of each weight instead of all. The
    bytes that `progress` hears of add up to at most those of the checkpoint's tensors. Raises
    SourceError for what cannot be read at all; all else is a finding.
    """
    began = time.monotonic()
    problems: Problems = []
    ckpt = open_checkpoint(path, problems=problems)
    subject, declared_wrong = _subject(ckpt, source)
    structure = [*declared_wrong, *check_structure(subject, problems)]
    checked = _data(subject, structure, fast, progress or (lambda what, done: None))
    everything = [*structure, *checked.findings]
    return Report(
        path=str(path),
        source=str(source) if source is not None else None,
        fast=fast,
        seconds=time.monotonic() - began,
        tensors_on_disk=len(ckpt.tensors),
        nbytes=ckpt.nbytes,
        findings=tuple(f for f in everything if f.severity == "fault"),
        notes=tuple(f for f in everything if f.severity == "note"),
        tensors=checked.tensors,
        copied=checked.copied,
        scales=checked.scales,
        checks=_counted(subject, checked),
    )


def _subject(ckpt: Checkpoint, source: str | Path | None) -> tuple[Subject, list[Finding]]:
    original = open_checkpoint(source) if source is not None else None
    declared, found = read_declared(ckpt)
    return Subject(ckpt, original, declared), found


def _data(subject: Subject, structure: list[Finding], fast: bool, progress: Progress) -> Checked:
    """Everything that reads tensors; a file that changes or ends under it is the user's to know."""
    from ckptq.verify.data import check_data

    try:
        return check_data(subject, structure, fast=fast, progress=progress)
    except OSError as error:
        raise SourceError(f"{subject.ckpt.path}: cannot be read: {error}") from error


def _counted(subject: Subject, checked: Checked) -> dict[str, int]:
    modules = subject.modules.values()
    return {
        "linears quantized": sum(m.quantized for m in modules),
        "linears left alone": sum(not m.quantized for m in modules),
        "attention layers": len(subject.attention),
        "cache scales": len(subject.cache_scales),
        "linears compared": len(checked.tensors),
        "tensors copied": checked.copied,
        "codes compared": sum(t.elements for t in checked.tensors),
    }
