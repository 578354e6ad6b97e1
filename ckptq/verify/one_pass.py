"""All checks that read tensors, in one pass over the checkpoint's bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from ckptq.checkpoint.open import CONFIG
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.models.witnesses import Witnesses
from ckptq.quantize.formats import needs_statistic
from ckptq.verify.diagnosis.diagnose import Case, diagnose
from ckptq.verify.diagnosis.rescaled import settle
from ckptq.verify.options import Options
from ckptq.verify.report import Checked, Finding
from ckptq.verify.roundtrip.copies import Copy, copy_tasks, finite_tasks, judge_copy, judge_finite
from ckptq.verify.roundtrip.decoders.check import check_decoders, check_fused
from ckptq.verify.roundtrip.dry_run import DryRun, dry_run
from ckptq.verify.roundtrip.kept_scales import with_kept_scales
from ckptq.verify.roundtrip.stream import Part, result_of, tasks
from ckptq.verify.roundtrip.tally import Tally
from ckptq.verify.roundtrip.tied_head import check_tied_head
from ckptq.verify.roundtrip.undo import Undo, make_undo
from ckptq.verify.roundtrip.verdict import verdict, with_tensor_scales
from ckptq.verify.roundtrip.work import in_order
from ckptq.verify.stored_linear import StoredLinear, stored_linear
from ckptq.verify.subject import Subject
from ckptq.verify.values.activations import check_inputs
from ckptq.verify.values.fused_scales import check_fused_scales
from ckptq.verify.values.plausible import cache_values, check_linear_values
from ckptq.verify.values.shared_cache import check_latent, check_shared_cache

if TYPE_CHECKING:
    from torch import Tensor

HARMLESS = ("shape-missing", "input-scale-missing", "input-scale-extra", "g-idx")
"""Structural findings that do not keep a weight from being compared."""


def check_data(
    subject: Subject,
    by_linear: Mapping[str, tuple[Finding, ...]],
    structure: Iterable[Finding],
    options: Options,
) -> Checked:
    """Values, round trip and copies. Linears with faults in `by_linear` are left out; `structure`
    holds all findings from headers."""
    fast = options.fast
    linears = {linear.name: linear for linear in sound(subject, by_linear)}
    undo = make_undo(subject)
    with Files() as files:
        rows, found = cache_values(subject, files)
        found += check_shared_cache(subject, rows)
        found += check_latent(subject, rows)
        for linear in linears.values():
            found += check_linear_values(linear, files)
        found += check_inputs(linears, files)
        found += check_fused_scales(subject.witnesses, linears, files)
        found += check_tied_head(subject, files)
        found += _new_groups(check_decoders(subject, linears, files, undo), structure)
        found += check_fused(subject, files)
        parts = _round_trip(linears, files, undo, options)
        copies = _copies(subject, files, undo, options)
        tallies = _tallies(subject.witnesses, linears, parts, files, fast)
        tallies = with_kept_scales(subject, linears, tallies, files, undo)
        for part in parts:
            found += part.findings
        case = Case(subject=subject, linears=linears, tallies=tallies, files=files, undo=undo)
        found += _judged(case, found)
        for copy in copies:
            found += judge_copy(subject, copy) if subject.source else judge_finite(subject, copy)
        found = settle(case, _without_copies_of_other_weights(found))
        simulated = DryRun(arrivals=(), findings=())
        if options.engine is not None:
            simulated = dry_run(subject, linears, tallies, options.engine, files)
    different = {copy.name for copy in copies if copy.different}
    return Checked(
        findings=(*found, *simulated.findings),
        tensors=tuple(result_of(linears[name], tally) for name, tally in tallies.items()),
        scales=tuple(rows),
        arrivals=simulated.arrivals,
        copied=len({copy.name for copy in copies} - different) if subject.source else 0,
    )


def assist(
    subject: Subject, by_linear: Mapping[str, tuple[Finding, ...]], options: Options
) -> None:
    """What ranks behind the first do of `check_data`: their share of all comparisons."""
    linears = {linear.name: linear for linear in sound(subject, by_linear)}
    undo = make_undo(subject)
    with Files() as files:
        _round_trip(linears, files, undo, options)
        _copies(subject, files, undo, options)


def _judged(case: Case, values: list[Finding]) -> list[Finding]:
    """Notes and faults of the comparison; suspects are diagnosed, unless their values are already
    known to be wrong."""
    bad = {f.tensor.rpartition(".")[0] for f in values if f.tensor and f.severity == "fault"}
    found: list[Finding] = []
    suspects = []
    for name, tally in case.tallies.items():
        judged = verdict(case.linears[name], tally)
        if judged is not None:
            found += judged
        elif name not in bad:
            suspects.append(name)
    return found + diagnose(case, suspects)


def sound(subject: Subject, by_linear: Mapping[str, tuple[Finding, ...]]) -> Iterator[StoredLinear]:
    """Quantized Linears whose tensors match their scheme."""
    for name, wrong in by_linear.items():
        module = subject.modules[name]
        whole = module.shape is not None and 0 not in module.shape
        if whole and all(f.code in HARMLESS for f in wrong):
            yield stored_linear(module)


def _round_trip(
    linears: dict[str, StoredLinear], files: Files, undo: Undo, options: Options
) -> list[Part]:
    """The results of all ranks, in the order of the tasks."""
    mine: list[list[Part]] = []
    for made in in_order(options.ranks.share(tasks(linears.values(), files, undo, options.fast))):
        mine.append(made)
        options.progress(made[0].name, sum(part.nbytes for part in made))
    return [part for made in options.ranks.joined(mine) for part in made]


def _copies(subject: Subject, files: Files, undo: Undo, options: Options) -> list[Copy]:
    make = copy_tasks(subject, files, undo, options.fast)
    if subject.source is None:
        make = finite_tasks(subject, files, options.fast)
    mine: list[Copy] = []
    for copy in in_order(options.ranks.share(make)):
        mine.append(copy)
        options.progress(copy.name, copy.nbytes)
    copies: dict[str, Copy] = {}
    for copy in options.ranks.joined(mine):
        before = copies.get(copy.name)
        copies[copy.name] = copy if before is None else _added(before, copy)
    return list(copies.values())


def _added(a: Copy, b: Copy) -> Copy:
    counts = (f.name for f in fields(a) if f.name != "name")
    return replace(a, **{name: getattr(a, name) + getattr(b, name) for name in counts})


def _tallies(
    witnesses: Witnesses,
    linears: dict[str, StoredLinear],
    parts: list[Part],
    files: Files,
    fast: bool,
) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    for part in parts:
        if part.tally is not None:
            tallies[part.name] = tallies.get(part.name, Tally()) + part.tally
    if fast:
        return tallies
    held = {name: _lone_scale(linears[name], files) for name in tallies if _lone(linears[name])}
    origins = {n: m.origin for n, m in ((n, linears[n].module) for n in linears) if m.origin}
    named = {name: linears[name].module.origin for name in held}
    sets = {n: witnesses.fused_set(origin.name, origins) for n, origin in named.items() if origin}
    return with_tensor_scales(linears, tallies, held, sets)


def _lone(linear: StoredLinear) -> bool:
    return needs_statistic(linear.scheme)


def _lone_scale(linear: StoredLinear, files: Files) -> Tensor:
    local = "weight_scale" if linear.scheme.strategy == "tensor" else "weight_global_scale"
    return read_tensor(linear.tensors[local], files)


def _new_groups(found: Iterable[Finding], structure: Iterable[Finding]) -> list[Finding]:
    """Without refusals of groups whose invalid fields are already reported."""
    told = [f.tensor for f in structure if f.tensor and f.file == CONFIG]
    return [
        f
        for f in found
        if f.code != "group-invalid" or not any(t.startswith(f"{f.tensor}.") for t in told)
    ]


def _without_copies_of_other_weights(found: list[Finding]) -> list[Finding]:
    """A differing copy is redundant in a shard, or checkpoint, of other weights."""
    stale = {f.file for f in found if f.code == "stale-shard"}
    other = any(f.code == "other-source" for f in found)
    return [f for f in found if f.code != "copy-differs" or not (other or f.file in stale)]
