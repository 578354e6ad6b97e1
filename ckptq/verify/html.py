"""The report as one page that opens without a network: verdict, findings, plots, figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ckptq.files import text_bytes, write_whole
from ckptq.printable import on_page, size
from ckptq.verify.kinds import KINDS
from ckptq.verify.report import Finding, HeadResult, Report
from ckptq.verify.svg import Series, plot

MOST_ROWS = 500
"""A table longer than this is read by nobody, and JSON has it all."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667085; --line: #d0d5dd; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #98a2b3; --line: #3a4048; --page: #14171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 940px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 3px 10px 3px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
.said td, td:first-child { white-space: normal; overflow-wrap: anywhere; }
.said td:first-child, .said td:last-child { overflow-wrap: normal; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; padding: 3px 0 3px 14px; }
.soft { color: var(--soft); } .bad { color: #d92d20; } .good { color: #079455; }
code { font: 12px ui-monospace, monospace; }
svg { width: 100%; height: auto; margin-top: 0.6rem; }
svg text { font-size: 11px; fill: var(--soft); }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 0.6; }
.legend { margin: 0 0 0.8rem; font-size: 12px; } .legend span { margin-right: 1.2em;
  white-space: nowrap; display: inline-block; }
.legend svg { width: 10px; height: 10px; margin: 0 4px 0 0; vertical-align: -1px; }
"""


def write_html_report(file: Path, report: Report) -> None:
    """Write the page; MachineError names the file that the machine would not take."""
    write_whole(file, text_bytes(html_report(report)))


def html_report(report: Report) -> str:
    """The whole page. Everything that came from the checkpoint is escaped."""
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
    title = f"ckptq verify: {on_page(report.path)}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )


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
        f"<td><code>{_breakable(where)}</code></td><td>{on_page(found)}</td><td>{on_page(wanted)}</td><td>{on_page(repair)}</td></tr>"
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
    found: dict[str, list[tuple[float, float, str]]] = {}
    for one in report.tensors:
        said = f"{one.name}: {one.snr_db:.2f} dB, floor {one.floor_db:.1f}, {one.scheme}"
        found.setdefault(_projection(one.name), []).append((_layer(one.name), one.snr_db, said))
    if not found:
        return ""
    floor = min(one.floor_db for one in report.tensors)
    layers = [x for points in found.values() for x, _, _ in points]
    series = [Series(name=name, points=points) for name, points in found.items()]
    ends = [(min(layers), floor, ""), (max(layers), floor, "")]
    series.append(Series(name=f"lowest floor, {floor:.1f} dB", points=ends, line=True))
    drawn = plot(series, y_label="signal to quantization noise, dB", x_label="layer")
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
    return _table(head, rows, numbers=5)


def _scales(report: Report) -> str:
    """q, k and v scales of every head, over the layers."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for row in report.scales:
        which = row.tensor.rpartition(".")[2].removesuffix("_scale")
        for head, value in enumerate(row.values):
            said = f"{row.tensor}[{head}] = {value:.4g}"
            found.setdefault(which, []).append((_layer(row.tensor), value, said))
    series = [Series(name=f"{which} scales", points=points) for which, points in found.items()]
    drawn = plot(series, y_label="scale, one point a head", x_label="layer", log=True)
    return f"<h2>Cache and attention scales</h2>{drawn}" if drawn else ""


def _heads(report: Report) -> str:
    """What FP8 loses on each head, and what a scale per tensor would."""
    if not report.heads:
        return ""
    own = _head_points(report.heads, "error")
    shared = _head_points(report.heads, "error_shared")
    clipped = _head_points(report.heads, "saturated")
    errors = plot(
        [
            Series(name="as stored", points=own),
            Series(name="one scale for all heads", points=shared),
        ],
        y_label="relative error of q, k, v in FP8, one point a head",
        x_label="layer",
        log=True,
    )
    saturation = plot(
        [Series(name="share of values clipped", points=clipped)],
        y_label="saturation, heads that have any", x_label="layer", log=True,
    )  # fmt: skip
    saturation = saturation or '<p class="soft">No value of any head is clipped.</p>'
    return f"<h2>Heads under load</h2>{errors}{saturation}{_matter(report.heads)}"


def _head_points(heads: Iterable[HeadResult], field: str) -> list[tuple[float, float, str]]:
    found: list[tuple[float, float, str]] = []
    for one in heads:
        value = float(getattr(one, field))
        said = f"{one.module} {one.which}{one.head}: {value:.3g}"
        found.append((_layer(one.module), value, said))
    return found


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
    return _table(head, rows, numbers=6)


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    kinds = (("as stored", "error"), ("one scale for all heads", "error_shared"),
             ("scale 1.0", "error_unscaled"))  # fmt: skip
    series = []
    for name, field in kinds:
        points: list[tuple[float, float, str]] = []
        for one in report.layers:
            value = float(getattr(one, field))
            points.append((_layer(one.module), value, f"{one.module}: {value:.3g}"))
        series.append(Series(name=name, points=points))
    label = "relative error of the attention output"
    drawn = plot(series, y_label=label, x_label="layer", log=True)
    return f"<h2>Attention output in FP8</h2>{drawn}"


def _arrivals(report: Report) -> str:
    if not report.arrivals:
        return ""
    rows = [
        (one.tensor, one.done, "" if one.snr_db is None else f"{one.snr_db:.1f}",
         "right" if one.ok else "WRONG")
        for one in sorted(report.arrivals, key=lambda one: one.ok)[:MOST_ROWS]
    ]  # fmt: skip
    head = ("tensor", "what the loader does", "dB", "arrives")
    return f"<h2>Loaded by {on_page(report.engine or '')}</h2>{_table(head, rows, numbers=0)}"


def _checks(report: Report) -> str:
    rows = [(name, f"{count:,}") for name, count in report.checks.items()]
    return f"<h2>What was looked at</h2>{_table(('', ''), rows, numbers=1)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int) -> str:
    """The last `numbers` columns are set to the right."""
    first = len(head) - numbers
    classes = ["n" if index >= first else "" for index in range(len(head))]
    top = "".join(f'<th class="{c}">{on_page(h)}</th>' for c, h in zip(classes, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{c}">{_breakable(str(value))}</td>'
            for c, value in zip(classes, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _breakable(name: str) -> str:
    """Escaped, and broken after a dot where it must be."""
    return re.sub(r"\.(?=[a-z])", ".<wbr>", on_page(name))


def _layer(name: str) -> int:
    match = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
    return int(match[1][:6]) if match else -1


def _projection(name: str) -> str:
    """ "q_proj"; experts by their projection, all in one."""
    last = name.rpartition(".")[2]
    return f"experts {last}" if ".experts." in name else last
