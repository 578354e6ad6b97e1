"""The report as one page: verdict, findings, charts, figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptq.files import text_bytes, write_whole
from ckptq.printable import on_page, size
from ckptq.show.charts import Chart, Series, svg
from ckptq.show.page import breakable, page, table
from ckptq.verify.kinds import KINDS
from ckptq.verify.report import Finding, HeadResult, Report

Points = list[tuple[float, float]]

MOST_ROWS = 500
"""Longer tables are not read; JSON has everything."""


def write_html_report(file: Path, report: Report) -> None:
    """Write the page; MachineError names the file if it cannot be written."""
    write_whole(file, text_bytes(html_report(report)))


def html_report(report: Report) -> str:
    """The whole page. Everything from the checkpoint is escaped."""
    sections = (
        _head(report),
        _findings("Faults", report.findings),
        _findings("Notes", report.notes),
        _decibels(report),
        _scales(report),
        _heads(report),
        _layers(report),
        _arrivals(report),
        _checks(report),
    )
    return page(f"ckptq verify: {report.path}", sections)


def _head(report: Report) -> str:
    verdict = '<b class="good">right</b>'
    if not report.ok:
        verdict = f'<b class="bad">{len(report.findings)} faults</b>'
    source = (
        f"against <code>{on_page(report.source)}</code>" if report.source else "without a source"
    )
    sampled = ", samples of rows only" if report.fast else ""
    return (
        f"<h1><code>{on_page(report.path)}</code>: {verdict}</h1>"
        f'<p class="soft">{source}{sampled}; {report.tensors_on_disk} tensors, '
        f"{size(report.nbytes)}, {report.seconds:.1f} s</p>"
    )


def _findings(title: str, findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    rows = (
        (one.code, one.tensor or one.file or "", one.found, one.wanted, one.repair,
         KINDS[one.code].meaning)
        for one in findings[:MOST_ROWS]
    )  # fmt: skip
    body = "".join(
        f'<tr><td><b title="{on_page(why)}">{on_page(code)}</b></td>'
        f"<td><code>{breakable(where)}</code></td><td>{on_page(found)}</td><td>{on_page(wanted)}</td><td>{on_page(repair)}</td></tr>"
        for code, where, found, wanted, repair, why in rows
    )
    more = len(findings) - MOST_ROWS
    rest = f'<p class="soft">and {more} more: see --json</p>' if more > 0 else ""
    return (
        f'<h2>{title}</h2><table class="said"><tr><th>kind</th><th>where</th><th>found</th>'
        f"<th>wanted</th><th>repair</th></tr>{body}</table>{rest}"
    )


def _decibels(report: Report) -> str:
    """Signal to quantization noise of each Linear, over its layer, by projection."""
    found: dict[str, Points] = {}
    for one in report.tensors:
        found.setdefault(_projection(one.name), []).append((_layer(one.name), one.snr_db))
    if not found:
        return ""
    floor = min(one.floor_db for one in report.tensors)
    drawn = _over_layers(
        "signal to quantization noise, dB", found, limits=[(f"lowest floor, {floor:.1f} dB", floor)]
    )
    return f"<h2>Weights against the source</h2>{drawn}{_tensor_table(report)}"


def _tensor_table(report: Report) -> str:
    """The weights with the least signal, worst first."""
    worst = sorted(report.tensors, key=lambda one: one.snr_db - one.floor_db)[:12]
    rows = [
        (one.name, one.scheme, f"{one.snr_db:.2f}", f"{one.floor_db:.1f}", one.codes_wrong,
         one.codes_rounded_twice, one.scales_wrong)
        for one in worst
    ]  # fmt: skip
    head = ("lowest against their floor", "scheme", "dB", "floor", "codes not nearest",
            "rounded twice", "other scales")  # fmt: skip
    return table(head, rows, numbers=5)


def _scales(report: Report) -> str:
    """q, k and v scales of every head, over the layers."""
    found: dict[str, Points] = {}
    for row in report.scales:
        which = row.tensor.rpartition(".")[2].removesuffix("_scale")
        found.setdefault(f"{which} scales", []).extend((_layer(row.tensor), v) for v in row.values)
    drawn = _over_layers("scale, one point per head", found, log=True)
    return f"<h2>Cache and attention scales</h2>{drawn}" if drawn else ""


def _heads(report: Report) -> str:
    """What FP8 loses on each head, and what it would lose with one scale per tensor."""
    if not report.heads:
        return ""
    errors = _over_layers(
        "relative error of q, k, v in FP8, one point per head",
        {
            "as stored": [(_layer(one.module), one.error) for one in report.heads],
            "one scale for all heads": [(_layer(h.module), h.error_shared) for h in report.heads],
        },
        log=True,
    )
    clipped = [(_layer(one.module), one.saturated) for one in report.heads if one.saturated > 0]
    saturation = _over_layers(
        "saturation, of heads that have any", {"share of values clipped": clipped}, log=True
    )
    saturation = saturation or '<p class="soft">No value of any head is clipped.</p>'
    return f"<h2>Heads under load</h2>{errors}{saturation}{_matter(report.heads)}"


def _matter(heads: Sequence[HeadResult]) -> str:
    """The heads that a scale per tensor would hurt most."""
    worst = sorted(heads, key=lambda h: h.error_shared - h.error, reverse=True)[:12]
    rows = [
        (f"{h.module} {h.which} head {h.head}", f"{h.scale:.3g}", f"{h.amax:.3g}", f"{h.error:.1%}",
         f"{h.error_shared:.1%}", f"{h.error_unscaled:.1%}", f"{h.saturated:.2%}")
        for h in worst
    ]  # fmt: skip
    head = ("heads that matter", "scale", "largest value", "error", "one scale for all",
            "scale 1.0", "clipped")  # fmt: skip
    return table(head, rows, numbers=6)


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    kinds = (("as stored", "error"), ("one scale for all heads", "error_shared"),
             ("scale 1.0", "error_unscaled"))  # fmt: skip
    found: dict[str, Points] = {
        name: [(_layer(one.module), float(getattr(one, field))) for one in report.layers]
        for name, field in kinds
    }
    drawn = _over_layers("relative error of the attention output", found, log=True)
    return f"<h2>Attention output in FP8</h2>{drawn}"


def _over_layers(
    y_label: str,
    found: Mapping[str, Points],
    *,
    log: bool = False,
    limits: Sequence[tuple[str, float]] = (),
) -> str:
    series = [Series(name=name, points=points) for name, points in found.items()]
    return svg(
        Chart(
            series=series, x_label="layer", y_label=y_label, log=log, by_layer=True, limits=limits
        )
    )


def _arrivals(report: Report) -> str:
    if not report.arrivals:
        return ""
    rows = [
        (one.tensor, one.done, "" if one.snr_db is None else f"{one.snr_db:.1f}",
         "right" if one.ok else "WRONG")
        for one in sorted(report.arrivals, key=lambda one: one.ok)[:MOST_ROWS]
    ]  # fmt: skip
    head = ("tensor", "what the loader does", "dB", "arrives")
    return f"<h2>Loaded by {on_page(report.engine or '')}</h2>{table(head, rows, numbers=0)}"


def _checks(report: Report) -> str:
    rows = [(name, f"{count:,}") for name, count in report.checks.items()]
    return f"<h2>What was checked</h2>{table(('', ''), rows, numbers=1)}"


def _layer(name: str) -> float:
    match = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
    return float(match[1][:6]) if match else -1.0


def _projection(name: str) -> str:
    """ "q_proj"; experts by their projection, all in one."""
    last = name.rpartition(".")[2]
    return f"experts {last}" if ".experts." in name else last
