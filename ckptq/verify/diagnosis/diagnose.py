"""Diagnosis of a wrong weight: hypotheses are tried, and the best one is reported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ckptq.checkpoint.read import Files
from ckptq.engines.vllm import common_set
from ckptq.errors import PlanError
from ckptq.numbered import starred
from ckptq.permute.targets import head_geometry
from ckptq.rope_order import Heads
from ckptq.verify.diagnosis.exchanged import (
    Directory,
    Explained,
    candidates,
    directory,
    explain,
    gather,
)
from ckptq.verify.diagnosis.head_order import match_heads
from ckptq.verify.diagnosis.hypotheses import hypotheses, rescaled_columns
from ckptq.verify.diagnosis.moved_rows import moved_rows
from ckptq.verify.diagnosis.sample import Sample, read_sample, rows_of_source
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.roundtrip import nearest
from ckptq.verify.roundtrip.tally import Tally, snr_db
from ckptq.verify.roundtrip.undo import Undo, source_order
from ckptq.verify.roundtrip.verdict import (
    CHOSEN_DB,
    DAMAGED,
    LEAST_CHOSEN_DB,
    undiagnosed,
)
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.structure.geometry import well_typed
from ckptq.verify.subject import EXPERT, Subject

BETTER_DB = 3.0
"""A hypothesis must improve on the stored weight by this much."""

STRETCHED_DB = 12.0
"""Columns of very different size suit a format badly: they may cost this much against the floor."""

TRIED = 8
"""Linears of one name to sample; more would take hours if all are wrong."""

FEW_SCALES = 0.01
"""Share of scales that counts as damage; exchanges affect more."""

SIDES = {"q_proj": "q", "k_proj": "k", "v_proj": "k"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a diagnosis can look at."""

    subject: Subject
    linears: Mapping[str, StoredLinear]
    tallies: Mapping[str, Tally]
    files: Files
    undo: Undo

    def sample(self, name: str) -> Sample:
        return read_sample(self.linears[name], self.files, self.undo)


def diagnose(case: Case, suspects: list[str]) -> list[Finding]:
    """One finding per suspect, or one for several with a common cause.

    Of many with similar names, `TRIED` are tried; what explains all of those explains the rest.
    """
    known = directory(case.tallies)
    explained: dict[str, Explained] = {}
    found: dict[str, Finding] = {}
    tried: dict[str, list[Finding | None]] = {}
    for name in suspects:
        linear, tally = case.linears[name], case.tallies[name]
        if _damaged(tally):
            found[name] = undiagnosed(linear, tally)
            continue
        before = tried.setdefault(starred(name), [])
        owned = _owned(name, tally, known)
        if owned is not None and (owned.certain or len(before) >= TRIED):
            explained[name] = owned.explained
        elif len(before) >= TRIED:
            found[name] = _like_others(linear, before) or undiagnosed(linear, tally)
        else:
            one = _one(case, name, known)
            before.append(one if isinstance(one, Finding) else None)
            if isinstance(one, Explained):
                explained[name] = one
            else:
                found[name] = one
    return [*gather(explained, case.linears), *_stale_shards(case, found)]


def _one(case: Case, name: str, known: Directory) -> Finding | Explained:
    """Everything is tried on one weight."""
    tally = case.tallies[name]
    sample = case.sample(name)
    alone = _alone(case, sample, tally)
    others = _others(case, sample, candidates(name, case.linears, case.tallies, known))
    if others is not None and (alone is None or others.snr_db > alone[0]):
        return others
    return alone[1] if alone is not None else undiagnosed(case.linears[name], tally)


def _like_others(linear: StoredLinear, tried: list[Finding | None]) -> Finding | None:
    """The common finding of all that were tried, for one that was not."""
    first = tried[0]
    if first is None or any(one is None or one.code != first.code for one in tried):
        return None
    local = (first.tensor or "").rpartition(".")[2]
    found = f"as in {len(tried)} similar ones that were tried: {first.found}"
    where, file = f"{linear.name}.{local}", linear.module.file
    return replace(first, tensor=where, file=file, found=found)


def _damaged(tally: Tally) -> bool:
    """Only a few codes or scales differ: damage, not an exchange."""
    if tally.foreign == 0 and 0 < tally.scales_wrong <= FEW_SCALES * tally.scales:
        return True
    return (tally.wrong - tally.twice) / max(tally.elements, 1) < DAMAGED and (
        not tally.scales_wrong or tally.foreign > 0
    )


def _alone(case: Case, sample: Sample, tally: Tally) -> tuple[float, Finding] | None:
    """The best hypothesis about this weight by itself, with its SNR."""
    base, accept = sample.snr(), sample.floor - CHOSEN_DB
    scales_only = tally.foreign == 0 and tally.scales_wrong > 0
    best: tuple[float, Finding] | None = None
    for snr, one in _tried(case, sample, scales_only):
        if snr >= max(accept, base + BETTER_DB) and (best is None or snr > best[0]):
            best = snr, one
    return best


def _tried(case: Case, sample: Sample, scales_only: bool) -> Iterator[tuple[float, Finding]]:
    linear = sample.linear
    projection = linear.name.rpartition(".")[2]
    heads = _heads(case, projection)
    order = source_order(case.subject)
    turned = heads if projection in ("q_proj", "k_proj") else None
    undone = case.undo.module(linear.name, linear.tensors)
    for one in hypotheses(sample, turned, order, scales_only, undone):
        yield sample.snr(one.held), _named(linear, one.code, one.found, one.repair)
    if heads is not None:
        for match in match_heads(sample, heads, scales_only):
            moved = [f"{i} holds {j}" for i, j in enumerate(match.order) if i != j]
            part = "the scales of heads" if match.scales_only else "heads"
            found = f"{part}: {', '.join(moved[:8])}"
            local = "weight_scale" if match.scales_only else linear.scheme.codes
            yield match.snr_db, _named(linear, "heads-swapped", found, None, local)
    if not scales_only:
        yield from _reshaped(case, sample)


def _reshaped(case: Case, sample: Sample) -> Iterator[tuple[float, Finding]]:
    """A forgotten transpose; columns that somebody stretched."""
    linear = sample.linear
    if linear.shape[0] == linear.shape[1]:
        transposed = rows_of_source(sample, case.files, sample.columns).t()
        code = "experts-transposed" if EXPERT.match(linear.name) else "codes-transposed"
        found = "the transpose of the source's weight"
        yield snr_db(sample.weights(), transposed), _named(linear, code, found, None)
        yield from _codes_turned(sample, transposed)
    moved = moved_rows(sample.weights(), linear.name, _sources(case, sample))
    if moved is not None:
        accept = sample.floor - CHOSEN_DB
        yield accept, _named(linear, "rows-moved", moved.said(linear.name), None)
    rescaled, best, one_factor = rescaled_columns(sample)
    least = max(min(best, sample.floor), sample.floor - STRETCHED_DB) - CHOSEN_DB
    least = LEAST_CHOSEN_DB if linear.module.chosen else least
    found = "every column is the source's, times its own factor"
    if rescaled >= max(least, one_factor + BETTER_DB):
        accept = max(rescaled, sample.floor - CHOSEN_DB)
        yield accept, _named(linear, "columns-rescaled", found, None)


def _sources(case: Case, sample: Sample) -> dict[str, Tensor]:
    """The source of a Linear and of those that are fused with it, in the sample's columns,
    as far as the source has them."""
    name = sample.linear.name
    parent, _, projection = name.rpartition(".")
    names = [n for m in common_set(projection) if (n := f"{parent}.{m}") in case.tallies]
    return {n: sample.w_RK if n == name else case.sample(n).w_RK for n in names}


def _codes_turned(sample: Sample, transposed_RK: Tensor) -> Iterator[tuple[float, Finding]]:
    """Codes transposed, and scales of rows left where they were."""
    linear, scale = sample.linear, sample.held["weight_scale"]
    if linear.scheme.codes == "weight" and scale.shape == (linear.shape[0], 1):
        value_RK = nearest.values(sample.held, linear.scheme, sample.columns)
        snr = snr_db(value_RK * scale[: sample.columns].float().t(), transposed_RK)
        found = "the codes are transposed, the scales are not"
        yield snr, _named(linear, "codes-transposed", found, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owned:
    """Whose scales these are, by digest."""

    explained: Explained
    certain: bool
    """Right codes leave no doubt; otherwise there may be other faults."""


def _owned(name: str, tally: Tally, known: Directory) -> Owned | None:
    owners = known.owners(name, tally)
    if not owners or not tally.scales_wrong:
        return None
    code = "misplaced" if tally.foreign else "scale-of-another"
    return Owned(
        explained=Explained(code=code, other=owners[0], snr_db=math.inf), certain=not tally.foreign
    )


def _others(case: Case, sample: Sample, names: list[str]) -> Explained | None:
    best: Explained | None = None
    base = sample.snr()
    for name in names:
        for one in explain(sample, case.sample(name)):
            if one.snr_db >= base + BETTER_DB and (best is None or one.snr_db > best.snr_db):
                best = one
    return best


def _heads(case: Case, projection: str) -> Heads | None:
    if projection not in SIDES or not well_typed(case.subject):
        return None
    try:
        return head_geometry(case.subject.ckpt.text_config)[SIDES[projection]]
    except PlanError:
        return None


def _stale_shards(case: Case, found: Mapping[str, Finding]) -> Iterator[Finding]:
    """Files in which every weight is wrong, while other files are right."""
    wrong: dict[str, list[str]] = {}
    for name, one in found.items():
        if one.code == "weight-wrong":
            wrong.setdefault(case.linears[name].module.file, []).append(name)
    held: dict[str, int] = {}
    for name in case.tallies:
        file = case.linears[name].module.file
        held[file] = held.get(file, 0) + 1
    stale = {file for file, names in wrong.items() if len(names) == held[file] > 1}
    for file in stale if len(held) > 1 and len(stale) < len(held) else ():
        other = f"all {held[file]} Linears come from another source"
        yield finding("stale-shard", file=file, found=other, wanted="this source's")
    if stale and len(stale) == len(held):
        count = sum(held.values())
        wanted = "the source of this checkpoint"
        yield finding(
            "other-source", found=f"none of {count} Linears matches the source", wanted=wanted
        )
    yield from (
        one
        for name, one in found.items()
        if case.linears[name].module.file not in stale or one.code != "weight-wrong"
    )


def _named(
    linear: StoredLinear, code: str, found: str, repair: str | None, local: str | None = None
) -> Finding:
    part = "weight_scale" if code.startswith("scale") else linear.scheme.codes
    tensor = linear.tensors[local or ("weight_zero_point" if code.startswith("zero") else part)]
    return finding(code, tensor, found=found, wanted="the source's weight", repair=repair)
