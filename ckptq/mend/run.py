"""`ckptq mend` as one call: verify, repair what is certain, write, verify again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ckptq.checkpoint.journal import check_free
from ckptq.checkpoint.open import Checkpoint, Problems, open_checkpoint
from ckptq.checkpoint.partial import check_apart
from ckptq.convert.output import DEFAULTS, RunOptions
from ckptq.errors import CkptqError, UsageError
from ckptq.mend.another_model import check_source
from ckptq.mend.case import Case
from ckptq.mend.draft import Draft, draft_of
from ckptq.mend.mendable import NOTES
from ckptq.mend.registry import HEADERS, NAMES, VALUES
from ckptq.mend.repair import Again, Made, Outcome, Repair, Told
from ckptq.mend.tensors.of_values import fold_heads
from ckptq.mend.trial import THOROUGH, settle_headers, wrong_in
from ckptq.mend.unreadable import open_broken
from ckptq.mend.unrepaired import left_in, mendable_in, needs_of, needs_text, still_told, told
from ckptq.mend.write_mended import write_in_place, write_mended
from ckptq.progress import Begin, Note, silent, untold
from ckptq.verify.loaders import find_engine
from ckptq.verify.options import Options
from ckptq.verify.report import Finding, Report
from ckptq.verify.run import Asking, judge, verify


@dataclass(frozen=True, kw_only=True, slots=True)
class MendRequest:
    """Which checkpoint is mended, with what, and where the result goes."""

    path: str | Path
    out: Path | None = None
    source: str | Path | None = None
    engine: str | None = None
    per_tensor: bool = False
    """Fold cache scales per head to one per layer."""
    headers_only: bool = False
    """Look at headers and config alone, which takes seconds."""
    in_place: bool = False
    dry_run: bool = False
    options: RunOptions = DEFAULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A line of what was done, or of what was not and why."""

    code: str
    where: str | None
    said: str
    needs: str | None = None
    """None for what was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mended:
    """What `mend` has found and done."""

    path: str
    out: str | None
    """Where the result is; None where nothing was written."""
    dry_run: bool
    repairs: tuple[Done, ...]
    left: tuple[Done, ...]
    kept: tuple[str, ...]
    """Copies of the files that were replaced in place."""
    before: Report
    after: Report | None
    """Of what was written."""

    @property
    def ok(self) -> bool:
        """Whether what is there now is right."""
        return (self.after or self.before).ok

    def to_dict(self) -> dict[str, Any]:
        """JSON data: of the two reports, what they come to."""
        reports = {"before": self.before, "after": self.after}
        return {
            "path": self.path,
            "out": self.out,
            "dry_run": self.dry_run,
            "ok": self.ok,
            "repairs": [asdict(one) for one in self.repairs],
            "left": [asdict(one) for one in self.left],
            "kept": list(self.kept),
            **{name: r and {"ok": r.ok, "counts": r.counts} for name, r in reports.items()},
        }


def mend(request: MendRequest, begin: Begin = silent, note: Note = untold) -> Mended:
    """Repair a checkpoint into `request.out`, which must not exist yet; nothing is guessed.

    The original is never changed, except with `in_place`, for config.json and the index. Where
    nothing can be repaired, nothing is written. UsageError for contradictory requests.
    """
    _check(request)
    problems: Problems = []
    ckpt = open_broken(request.path, request.source, problems)
    if request.out is not None and not request.dry_run:  # before hours of reading
        check_apart(ckpt.path, request.out)
        check_free(request.out)
    source = open_checkpoint(request.source) if request.source is not None else None
    before = judge(ckpt, source, _asking(request, ckpt, begin), problems)
    if source is not None:
        check_source(ckpt, source, before)
    draft, outcomes = _repaired(request, ckpt, source, before, begin)
    repairs = tuple(one for one in outcomes if isinstance(one, Repair))
    left = tuple(one for one in outcomes if isinstance(one, Told))
    if request.in_place:
        repairs, left = _in_place_only(repairs, left)
    kept: tuple[Path, ...] = ()
    out = None
    if repairs and not request.dry_run:
        out = Path(request.path) if request.in_place else request.out
        assert out is not None
        if request.in_place:
            kept = write_in_place(_again(ckpt, repairs))
        else:
            write_mended(
                draft, repairs, out, source=source, options=request.options, begin=begin, note=note
            )
    after = _verified(request, out, begin) if out is not None else None
    if after is not None and out is not None:
        left = left_in(Case(draft_of(open_checkpoint(out, problems=[])), source), after, left)
    return Mended(
        path=str(request.path),
        out=str(out) if out is not None else None,
        dry_run=request.dry_run,
        repairs=tuple(Done(code=r.code, where=r.where, said=r.said) for r in repairs),
        left=tuple(Done(code=t.code, where=t.where, said=t.said, needs=t.needs) for t in left),
        kept=tuple(map(str, kept)),
        before=before,
        after=after,
    )


def _check(request: MendRequest) -> None:
    if request.engine is not None:
        find_engine(request.engine)
    if request.in_place and request.out is not None:
        raise UsageError(f"--in-place writes no {request.out}; give one of the two")
    if not request.in_place and not request.dry_run and request.out is None:
        raise UsageError("give a folder for the result, or --in-place, or --dry-run")


def _asking(request: MendRequest, ckpt: Checkpoint, begin: Begin) -> Asking:
    engine = find_engine(request.engine) if request.engine is not None else None
    quick = request.headers_only or request.in_place
    return Asking(
        headers_only=quick,
        engine=request.engine,
        options=Options(fast=False, engine=engine, progress=begin("verify", ckpt.nbytes)),
    )


def _verified(request: MendRequest, out: Path, begin: Begin) -> Report:
    return verify(
        out,
        request.source,
        headers_only=request.headers_only or request.in_place,
        engine=request.engine,
        begin=begin,
    )


def _repaired(
    request: MendRequest,
    ckpt: Checkpoint,
    source: Checkpoint | None,
    before: Report,
    begin: Begin,
) -> tuple[Draft, list[Outcome]]:
    """The draft with all repairs, and what became of every finding."""
    draft, outcomes = draft_of(ckpt), list[Outcome]()
    if request.per_tensor and (fold := fold_heads(Case(draft, source))) is not None:
        draft = draft.repaired(fold)
        outcomes.append(fold)
    wanted = mendable_in(before)
    if not wanted:
        return draft, outcomes
    if any(one.code in NAMES for one in wanted):
        renamed = settle_headers(draft, source, NAMES, NOTES, THOROUGH)
        draft, outcomes = renamed.draft, [*outcomes, *renamed.repairs]
    settled = settle_headers(draft, source, HEADERS, NOTES)
    outcomes += settled.repairs
    found = before
    if outcomes:
        found = judge(settled.draft.ckpt, source, _asking(request, ckpt, begin), [])
    settled_codes = {one.code for one in outcomes}
    left = [one for one in mendable_in(found) if not _of_the_file(one, before, settled_codes)]
    draft, values = _values(settled.draft, source, left, {one.code: one for one in settled.told})
    repaired = [one for one in values if isinstance(one, Repair)]
    unmended = [one for one in values if isinstance(one, Told)]
    if repaired and unmended:
        now = {(one.code, one.tensor) for one in wrong_in(draft, source, NOTES)}
        was = wrong_in(settled.draft, source, NOTES)
        unmended = still_told(unmended, (one for one in was if (one.code, one.tensor) not in now))
    return draft, [*outcomes, *repaired, *unmended]


def _values(
    draft: Draft, source: Checkpoint | None, found: Sequence[Finding], several: Mapping[str, Told]
) -> tuple[Draft, list[Outcome]]:
    """Each finding by itself. The case is worked out anew only where config.json changes."""
    outcomes: list[Outcome] = []
    case = Case(draft, source)
    for one in found:
        if draft.settles(one):
            continue
        made = _one(case, one, several)
        if made is None or (isinstance(made, Repair) and _converted_already(draft, made)):
            continue
        outcomes.append(made)
        if isinstance(made, Repair):
            draft = draft.repaired(made)
            case = case if made.config is None else Case(draft, source)
    return draft, outcomes


def _converted_already(draft: Draft, repair: Repair) -> bool:
    """Whether it would compute something of what is converted again anyway."""
    again = {name for name, change in draft.computed.items() if isinstance(change, Again)}
    return any(name in again for name, c in repair.changes.items() if isinstance(c, Made))


def _of_the_file(one: Finding, before: Report, settled: Collection[str]) -> bool:
    """Whether a library was asked that read the files as they still are: by new names for tensors
    under the old ones, or by config.json for sizes. What is written is verified again."""
    if one.code == "decoder-disagrees":
        return all(other.code != one.code for other in before.findings)
    return one.code == "config-shapes" and one.code in settled


def _one(case: Case, one: Finding, several: Mapping[str, Told]) -> Outcome | None:
    """What becomes of one finding; `several` are codes whose repair has several readings."""
    if one.code in several:
        return several[one.code]
    repairer = VALUES.get(one.code)
    if needs_text(case, one) or repairer is None:
        return told(one, needs_of(case, one))
    try:
        return repairer(case, one)
    except CkptqError as error:
        return replace(told(one, "convert"), said=str(error))


def _in_place_only(
    repairs: tuple[Repair, ...], left: tuple[Told, ...]
) -> tuple[tuple[Repair, ...], tuple[Told, ...]]:
    """Repairs of config.json and index; others are told."""
    documents = tuple(one for one in repairs if one.of_documents)
    rest = [one for one in repairs if one not in documents]
    more = (
        Told(code=one.code, where=one.where, needs="choice", said="needs a new folder: give OUT")
        for one in rest
    )
    return documents, (*left, *more)


def _again(ckpt: Checkpoint, repairs: Sequence[Repair]) -> Draft:
    """The draft with these repairs alone."""
    draft = draft_of(ckpt)
    for one in repairs:
        draft = draft.repaired(one)
    return draft
