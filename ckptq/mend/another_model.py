"""A source that is not the checkpoint's: to mend by it would be to convert that other model."""

from __future__ import annotations

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import UsageError
from ckptq.verify.report import Finding, Report

OTHER_SHAPES = ("codes-shape", "copy-spec", "names-moved", "tensor-missing")
OTHER_COPIES = ("copy-differs", "copy-spec")


def check_source(ckpt: Checkpoint, source: Checkpoint, found: Report) -> None:
    """UsageError where `found`, the checkpoint against the source, says that it is another model's.

    That is one of another type whose tensors do not fit either, or one of which neither a quantized
    Linear nor all that is copied is in the checkpoint.
    """
    why = _other_type(ckpt, source, found) or _other_values(found)
    if why is not None:
        raise UsageError(
            f"--source {source.path}: {why}; {ckpt.path} was not made from it, or is beyond repair "
            "and has to be quantized again"
        )


def _other_type(ckpt: Checkpoint, source: Checkpoint, found: Report) -> str | None:
    ours, theirs = (each.config.get("model_type") for each in (ckpt, source))
    unfit = next((one for one in found.findings if one.code in OTHER_SHAPES), None)
    if ours == theirs or unfit is None:
        return None
    return f"is a {theirs!r}, not a {ours!r}, and its tensors differ ({unfit.code}: {_at(unfit)})"


def _other_values(found: Report) -> str | None:
    faulty = {name for one in found.findings for name in _names(one)}
    compared = {one.name for one in found.tensors}
    copies = [one for one in found.findings if one.code in OTHER_COPIES]
    misfits = compared or any(one.code == "codes-shape" for one in found.findings)
    if not copies or not misfits or compared - faulty:
        return None
    return f"no quantized Linear agrees with it, and {copies[0].tensor} differs too"


def _names(one: Finding) -> tuple[str, ...]:
    return () if one.tensor is None else (one.tensor, one.tensor.rpartition(".")[0])


def _at(one: Finding) -> str:
    return one.tensor or str(one.file)
