"""The report of `verify` as text: faults and notes by kind, what was proved, the verdict.

On a terminal long lines are wrapped at its width; elsewhere every finding stays on one line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from shutil import get_terminal_size
from statistics import median
from textwrap import wrap
from typing import TYPE_CHECKING

from ckptq.printable import size
from ckptq.show import console

if TYPE_CHECKING:
    from ckptq.verify.report import EngineRun, Finding, Report

SHOWN = 5
"""Findings shown per kind; `--json` has all."""

RATED = 100_000_000
"""Bytes from which on a rate is shown."""


def show_report(found: Report, json: bool) -> None:
    """`verify`: what is wrong and how to repair it, then what was proved."""
    if json:
        console.show_json(found)
        return
    console.show_lines(
        *_findings("FAULT", found.findings), *_findings("note ", found.notes), *_proposed(found)
    )
    _tables(found)
    console.show_lines(*_checked(found), _verdict(found))


def _findings(label: str, findings: Sequence[Finding]) -> Iterator[str]:
    """Grouped by kind, in order of first appearance."""
    from ckptq.verify.kinds import KINDS

    by_code: dict[str, list[Finding]] = {}
    for one in findings:
        by_code.setdefault(one.code, []).append(one)
    for code, alike in by_code.items():
        count = f" ({len(alike)} times)" if len(alike) > 1 else ""
        yield from _wrapped(f"{label} {code}: {KINDS[code].meaning}{count}", indent=0)
        shared = {one.repair for one in alike}
        for one in alike[:SHOWN]:
            said = f"found {one.found}; expected {one.wanted}"
            repair = f"; {one.repair}" if len(shared) > 1 else ""
            yield from _wrapped(f"{_where(one)}{said}{repair}", indent=6)
        if len(alike) > SHOWN:
            yield from _wrapped(f"and {len(alike) - SHOWN} more; --json has all", indent=6)
        if len(shared) == 1 and "none" not in shared:
            yield from _wrapped(f"repair: {alike[0].repair}", indent=6)


def _proposed(found: Report) -> Iterator[str]:
    """The command that repairs what can be repaired, on a line of its own to be copied."""
    if not found.ok:
        from ckptq.mend.proposal import proposal

        command = proposal(found)
        yield from [f"mend what can be mended: {command}"] if command else []


def _where(one: Finding) -> str:
    place = one.tensor or one.file
    return f"{place}: " if place else ""


def _wrapped(text: str, indent: int) -> list[str]:
    start = " " * indent
    if not sys.stdout.isatty():
        return [start + text]
    more = " " * (indent + 2)
    return wrap(
        text, max(get_terminal_size().columns, 40), initial_indent=start, subsequent_indent=more,
        break_on_hyphens=False,
    )  # fmt: skip


def _tables(found: Report) -> None:
    schemes: dict[str, list[float]] = {}
    for tensor in found.tensors:
        schemes.setdefault(tensor.scheme, []).append(tensor.snr_db)
    if schemes:
        console.show_table(
            "signal to quantization noise against the source",
            ("scheme", "Linears", "lowest dB", "median dB"),
            [(name, len(dbs), min(dbs), median(dbs)) for name, dbs in schemes.items()],
        )
    if found.arrivals:
        console.show_table(
            f"what {found.engine} makes of it",
            ("tensor", "loader", "dB", "right"),
            [(a.tensor, a.done, a.snr_db or "", a.ok) for a in found.arrivals],
        )
    if found.layers:
        console.show_table(
            "error of the attention output in FP8, against the source's dtype",
            ("layer", "these scales", "scale 1.0", "one per layer"),
            [(x.module, x.error, x.error_unscaled, x.error_shared) for x in found.layers],
        )


def _checked(found: Report) -> Iterator[str]:
    """What was checked: a check that saw nothing proves nothing."""
    checks = found.checks
    yield from _wrapped(
        f"checked: {checks['linears quantized']} Linears quantized, "
        f"{checks['linears left alone']} left alone, {checks['cache scales']} cache scales in "
        f"{checks['attention layers']} attention layers",
        indent=0,
    )
    if found.engine_run is not None:
        yield from _wrapped(_engine(found.engine_run), indent=0)
    if found.headers_only:
        yield "not read: any tensor (headers only)"
    elif found.source is None:
        yield "not compared: give --source to prove the weights"
    else:
        samples = " in samples of rows" if found.fast else ""
        yield from _wrapped(
            f"compared: {checks['codes compared']:,} codes of {checks['linears compared']} "
            f"Linears{samples}, {checks['tensors copied']} tensors that are copies",
            indent=0,
        )
        if checks["codes exact"]:
            share = checks["codes exact"] / checks["codes compared"]
            yield f"exact: {share:.4%} of these codes are the source's own numbers"
    if checks["cache scales"] and not found.layers:
        yield "not proved: the values of cache scales, which follow from text: --attention runs it"


def _engine(run: EngineRun) -> str:
    if not run.real:
        return f"{run.name}: simulated by ckptq's rules, not asked itself (--vllm-python PYTHON)"
    return (
        f"{run.name} {run.version} itself: names, shapes and dtypes of {run.places} parameters "
        f"in {run.seconds:.1f} s{''.join(f'; {remark}' for remark in run.remarks)}"
    )


def _verdict(found: Report) -> str:
    count = len(found.findings)
    verdict = "right" if found.ok else f"{count} fault{'' if count == 1 else 's'}"
    rate = f", {size(found.nbytes / max(found.seconds, 1e-9))}/s"
    whole = found.nbytes > RATED and not found.fast and not found.headers_only
    return (
        f"{found.path}: {verdict}; {found.tensors_on_disk} tensors, {size(found.nbytes)} in "
        f"{found.seconds:.1f} s{rate if whole else ''}"
    )
