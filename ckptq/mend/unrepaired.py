"""What is not repaired: what each finding needs, and what a report says is left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ckptq.mend.case import Case
from ckptq.mend.mendable import FROM_SOURCE, NOTES, TEXT, WITH_SOURCE
from ckptq.mend.repair import Needs, Told
from ckptq.verify.report import Finding, Report

INPUT_SCALES = ("input_scale", "input_global_scale")


def is_mendable(one: Finding) -> bool:
    """Whether `mend` cares: about faults, and about notes that harm in some engine."""
    return one.severity == "fault" or one.code in NOTES


def mendable_in(report: Report) -> list[Finding]:
    return [one for one in (*report.findings, *report.notes) if is_mendable(one)]


def told(one: Finding, needs: Needs) -> Told:
    """The finding with its own advice."""
    return Told(code=one.code, where=one.tensor or one.file, needs=needs, said=one.repair)


def needs_of(case: Case, one: Finding) -> Needs:
    """What a finding needs that has no repair."""
    if needs_text(case, one):
        return "text"
    with_source = one.code in WITH_SOURCE or one.code in FROM_SOURCE
    return "source" if case.source is None and with_source else "convert"


def needs_text(case: Case, one: Finding) -> bool:
    """Whether it is about a value that only calibration gives."""
    if one.code in TEXT:
        return True
    if one.code == "shared-cache-scale" or one.tensor is None:
        return False
    if one.tensor.endswith(INPUT_SCALES):
        return one.code.startswith("scale")
    return one.tensor in (tensor.name for tensor in case.subject.cache_scales.values())


def still_told(before: Sequence[Told], gone: Iterable[Finding]) -> list[Told]:
    """Without what has gone with the repair of something else."""
    places = {(one.code, one.tensor or one.file) for one in gone}
    return [one for one in before if (one.code, one.where) not in places]


def left_in(case: Case, report: Report, before: Sequence[Told]) -> tuple[Told, ...]:
    """What the report of a result finds, each as it was told `before`, if it was."""
    return tuple(dict.fromkeys(_left(case, report, before)))


def _left(case: Case, report: Report, before: Sequence[Told]) -> Iterator[Told]:
    exact = {(one.code, one.where): one for one in before}
    alike = {one.code: one for one in before}
    for one in mendable_in(report):
        mine = told(one, needs_of(case, one))
        if (one.code, mine.where) in exact:
            yield exact[one.code, mine.where]
        elif one.code in alike:
            yield replace(alike[one.code], where=mine.where)
        else:
            yield mine
