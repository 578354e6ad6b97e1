"""Repairs that headers can judge: each candidate is tried, and made if it alone leaves less wrong.

A candidate that brings a new fault is none. Candidates that one maker yields are readings of the
same fault: if several would do, none is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import CkptqError
from ckptq.mend.case import Case
from ckptq.mend.draft import Draft
from ckptq.mend.repair import Repair, Told
from ckptq.progress import silent
from ckptq.verify.options import Options
from ckptq.verify.report import Finding
from ckptq.verify.run import Asking, judge

Maker = Callable[[Case, Sequence[Finding]], Iterator[Repair]]
"""All findings of one code -> the ways to repair them."""

Makers = Mapping[str, tuple[Maker, ...]]
"""Code -> its makers, the one with the best evidence first."""

REVEALING = ("names-moved",)
"""What hides other faults until it is repaired."""

ROUNDS = 24
"""Far more than there are kinds of faults in one checkpoint."""

OPTIONS = Options(fast=False, engine=None, progress=silent("", 0))
QUICK = Asking(headers_only=True, options=OPTIONS)
THOROUGH = Asking(headers_only=True, quick=False, options=OPTIONS)
"""The engine's table knows no names but its own, so that it cannot say how layers were renamed."""


@dataclass(frozen=True)
class Trial:
    """What is tried, and how it is judged."""

    makers: Makers
    notes: Sequence[str]
    asking: Asking


@dataclass(frozen=True)
class Settled:
    """What the trials have come to."""

    draft: Draft
    repairs: tuple[Repair, ...]
    told: tuple[Told, ...]


def wrong_in(
    draft: Draft, source: Checkpoint | None, notes: Sequence[str], asking: Asking = QUICK
) -> list[Finding]:
    """Faults, and notes of these kinds, that headers show."""
    report = judge(draft.ckpt, source, asking, [])
    found = [*report.findings, *(note for note in report.notes if note.code in notes)]
    return [one for one in found if not draft.settles(one)]


def settle_headers(
    draft: Draft,
    source: Checkpoint | None,
    makers: Makers,
    notes: Sequence[str],
    asking: Asking = QUICK,
) -> Settled:
    """Repair by repair, until none helps."""
    repairs: list[Repair] = []
    told: dict[str, Told] = {}
    found = wrong_in(draft, source, notes, asking)
    for _ in range(ROUNDS):
        step = _step(Case(draft, source), found, Trial(makers, notes, asking), told)
        if step is None:
            break
        repair, draft, found = step
        repairs.append(repair)
    left = {one.code for one in found}
    return Settled(draft, tuple(repairs), tuple(t for c, t in told.items() if c in left))


Step = tuple[Repair, Draft, list[Finding]]


def _step(case: Case, found: list[Finding], trial: Trial, told: dict[str, Told]) -> Step | None:
    """The first repair that helps; codes with several readings are entered in `told`."""
    by_code: dict[str, list[Finding]] = {}
    for one in found:
        by_code.setdefault(one.code, []).append(one)
    for code in (c for c in trial.makers if c in by_code):
        for maker in trial.makers[code]:
            fits = list(_helpful(case, maker(case, by_code[code]), found, trial))
            if not fits:
                continue
            fewest = min(len(left) for _, _, left in fits)
            best = [step for step in fits if len(step[2]) == fewest]
            if len(best) == 1:
                return best[0]
            told[code] = _several(code, by_code[code][0], [step[0] for step in best])
            break
    return None


def _several(code: str, first: Finding, repairs: Sequence[Repair]) -> Told:
    said = " or ".join(repair.said for repair in repairs)
    return Told(code=code, where=first.tensor, needs="choice", said=said)


def _helpful(
    case: Case, repairs: Iterator[Repair], found: list[Finding], trial: Trial
) -> Iterator[Step]:
    before = {(one.code, one.tensor) for one in found}
    for repair in repairs:
        draft = case.draft.repaired(repair)
        try:
            left = wrong_in(draft, case.source, trial.notes, trial.asking)
        except CkptqError:
            continue
        new = {(f.code, f.tensor) for f in left if f.severity == "fault"} - before
        if (repair.code in REVEALING or not new) and _less(repair, left, found):
            yield repair, draft, left


def _less(repair: Repair, left: list[Finding], found: list[Finding]) -> bool:
    """Whether it removes findings; of a revealing kind, those of its own."""
    if repair.code in REVEALING:
        return all(one.code != repair.code for one in left)
    return len(left) < len(found)
