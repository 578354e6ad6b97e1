"""Repairs with the source: Linears converted again, copies made again, files copied.

What is made is what a plan of the source with the checkpoint's own config.json promises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckptq.mend.case import Case
from ckptq.mend.config.edit import with_quantization
from ckptq.mend.repair import Again, Change, Outcome, Repair, Told
from ckptq.plan.unit import Unit
from ckptq.quantize.formats import needs_statistic
from ckptq.recipes.names import read_names
from ckptq.verify.report import Finding
from ckptq.verify.subject import CODES, EXPERT, SCALES

NOT_CHOSEN = "; rounded to nearest, where the recipe chose codes by calibration"


def make_again(case: Case, finding: Finding) -> Outcome | None:
    """All that the plan makes of what the finding names: a Linear, a copy, an expert, a layer."""
    if case.source is None:
        return _needs_source(finding)
    if not case.units:
        return Told(
            code=finding.code, where=finding.tensor, needs="convert", said=_why_no_plan(case)
        )
    names = list(_named(case, finding))
    changes: dict[str, Change] = {}
    for name in names:
        changes |= _made(case, name)
    if not changes:
        where, said = (
            finding.tensor,
            f"the source's conversion has no such tensor; {finding.repair}",
        )
        return Told(code=finding.code, where=where, needs="convert", said=said)
    changes |= dict.fromkeys(_extra(case, changes))
    converted = any(isinstance(change, Again) for change in changes.values())
    said = "converted again from the source" if converted else "copied again from the source"
    chosen = converted and case.chosen
    said += NOT_CHOSEN if chosen else ""
    return Repair(code=finding.code, where=finding.tensor, said=said, changes=changes)


def make_shard_again(case: Case, finding: Finding) -> Outcome | None:
    """Everything in a shard that is from another run."""
    if case.source is None:
        return _needs_source(finding)
    held = [h for h in case.draft.ckpt.headers if h.file.name == finding.file]
    changes: dict[str, Change] = {}
    for name in (name for header in held for name in header.tensors):
        changes |= _made(case, name)
    if not changes:
        return Told(code=finding.code, where=finding.file, needs="convert", said=_why_no_plan(case))
    said = f"{len(changes)} tensors made again from the source"
    return Repair(code=finding.code, where=finding.file, said=said, changes=changes)


def level_experts(case: Case, finding: Finding) -> Outcome | None:
    """An expert that is not quantized as the first is, and `ignore` where it names it alone."""
    match = EXPERT.match(finding.tensor or "")
    if match is None or case.source is None:
        return make_again(case, finding)
    first = f"{match['experts']}.0.{match['projection']}"
    own = dict(case.draft.ckpt.quantization_config or {})
    ignore = own.get("ignore") or []
    own["ignore"] = [
        e for e in ignore
        if not read_names([str(e)]).match(finding.tensor or "") or read_names([str(e)]).match(first)
    ]  # fmt: skip
    config = with_quantization(case.draft.ckpt, own)
    changed = Repair(code=finding.code, where=finding.tensor, said="", config=config)
    outcome = make_again(Case(case.draft.repaired(changed), case.source), finding)
    return replace(outcome, config=config) if isinstance(outcome, Repair) else outcome


def copy_file(case: Case, finding: Finding) -> Outcome | None:
    """A file of the source beside its shards."""
    if case.source is None or finding.file is None:
        return _needs_source(finding)
    file = case.source.path / finding.file
    if not file.is_file():
        return Told(
            code=finding.code, where=finding.file, needs="choice",
            said=f"the source has no {finding.file}; {finding.repair}",
        )  # fmt: skip
    return Repair(
        code=finding.code, where=finding.file, said="copied from the source",
        files={finding.file: file},
    )  # fmt: skip


def _needs_source(finding: Finding) -> Told:
    return Told(
        code=finding.code, where=finding.tensor or finding.file, needs="source", said=finding.repair
    )


def _why_no_plan(case: Case) -> str:
    return f"the source cannot be converted by this config.json: {case.plan}"


def _named(case: Case, finding: Finding) -> Iterator[str]:
    """The tensors of the plan that a finding is about; of missing parts only what is missing."""
    where = finding.tensor or ""
    parent = where.rpartition(".")[0]
    missing = finding.code in ("expert-missing", "layer-missing")
    scopes = [f"{where}."]
    if parent in case.subject.modules or f"{parent}.weight_scale" in case.units:
        scopes.append(f"{parent}.")
    for name in case.units:
        if name == where or any(name.startswith(scope) for scope in scopes):
            if missing and name in case.draft.ckpt.tensors:
                continue
            yield name
    if finding.code == "layer-missing":
        yield from (n for n in case.units if n not in case.draft.ckpt.tensors)


def _made(case: Case, name: str) -> dict[str, Change]:
    """This tensor of the plan, and all that can only be made with it; nothing for a scale that
    calibration makes."""
    unit = case.units.get(name)
    if unit is None or name in unit.scales:
        return {}
    if name in unit.copies:
        return {name: unit.copies[name]}
    if name in unit.views:
        return {name: Again(spec=unit.writes[name], unit=unit)}
    together = needs_statistic(unit.parts[0].scheme)
    parts = [p for p in unit.parts if together or name.startswith(f"{p.linear.name}.")]
    return {
        f"{part.linear.name}.{local}": Again(spec=spec, unit=unit)
        for part in parts
        for local, spec in part.writes.items()
    }


def _extra(case: Case, changes: dict[str, Change]) -> Iterator[str]:
    """Codes and scales of the same Linears that the plan does not have."""
    modules = {name.rpartition(".")[0] for name in changes}
    for name in case.draft.ckpt.tensors:
        module, _, local = name.rpartition(".")
        if module in modules and name not in case.units and local in (*CODES, *SCALES):
            yield name


def restricted(unit: Unit, wanted: frozenset[str]) -> Unit:
    """The unit without what is not wanted of it."""
    return replace(
        unit,
        copies={},
        scales={},
        views={name: view for name, view in unit.views.items() if name in wanted},
        parts=tuple(
            part
            for part in unit.parts
            if any(f"{part.linear.name}.{local}" in wanted for local in part.writes)
        ),
    )
