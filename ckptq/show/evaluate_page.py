"""An evaluation as a file: HTML with charts, an SVG, or a PNG."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ckptq.errors import MachineError, UsageError
from ckptq.evaluate.result import Evaluation, Row
from ckptq.files import text_bytes, write_whole
from ckptq.printable import on_page
from ckptq.show.charts import Chart, Series, png, svg
from ckptq.show.page import page, table

SUFFIXES = (".html", ".svg", ".png")

Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""Title, columns and rows, as on the console."""


def check_report(file: Path, *others: Path | None) -> None:
    """Checked before anything is computed: UsageError for a name or folder that cannot be right, or
    for one of the `others` that the command writes, MachineError if the file cannot be written."""
    if file.suffix not in SUFFIXES:
        raise UsageError(f"--report {file}: expected a name that ends in {', '.join(SUFFIXES)}")
    if any(other is not None and other.resolve() == file.resolve() for other in others):
        raise UsageError(f"--report {file}: the command writes another file there")
    if not file.parent.is_dir():
        raise UsageError(f"--report {file}: {file.parent} is not a folder")
    if file.is_dir():
        raise UsageError(f"--report {file}: is a folder")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise MachineError(f"--report {file}: cannot be written: {error.strerror}") from error


def write_report(file: Path, found: Evaluation, tables: Iterable[Table]) -> None:
    """Write `--report`, in the format of the file's suffix."""
    write_drawn(file, quality_chart(found), html(found, tables))


def write_drawn(file: Path, chart: Chart, text: str) -> None:
    """The chart, or the page, whichever the file's suffix asks for."""
    if file.suffix == ".png":
        png(chart, file)
    elif file.suffix == ".svg":
        write_whole(file, text_bytes(svg(chart) + "\n"))
    else:
        write_whole(file, text_bytes(text))


def html(found: Evaluation, tables: Iterable[Table]) -> str:
    """One file, without scripts."""
    title = f"ckptq evaluate: {found.source.weights}"
    return page(
        title,
        (
            f"<h1>{on_page(title)}</h1>",
            _verdict(found),
            *(f"<p>{on_page(warning)}</p>" for warning in found.warnings),
            *(shown_table(*each) for each in tables),
            f"<h2>Quality against size</h2>{svg(quality_chart(found))}",
            f"<h2>Layer by layer</h2>{svg(layer_chart(found))}",
        ),
    )


def quality_chart(found: Evaluation) -> Chart:
    """KL of every row over the bytes of its weights or, if all have the same weights, the
    bits of a cached value; a line through the rows that no other beats in both."""
    rows = found.rows
    same = len({row.nbytes for row in rows}) == 1 and len({row.cache_bits for row in rows}) > 1
    points = [(row.cache_bits if same else row.nbytes / 1e6, row.measures.kl) for row in rows]
    best = sorted(points[i] for i in frontier(points))
    series = [
        Series(name=_named(name, [kl]), points=[(x, kl)])
        for name, (x, kl) in zip(names_of(rows), points, strict=True)
    ]
    if len(best) > 1:
        line = Series(name="none is both smaller and closer", points=best, line=True, dashed=True)
        series.append(line)
    return Chart(
        series=series,
        x_label="cache, bits per value" if same else "size, MB",
        y_label="KL divergence, nats",
        log=True,
        limits=list(_limits(found)),
    )


def layer_chart(found: Evaluation) -> Chart:
    """Error of the hidden states after every layer, a line per row; the control is dashed."""
    named = [(*each, False) for each in zip(names_of(found.rows), found.rows, strict=True)]
    named.append(("control: a layer spoiled", found.control, True))
    return Chart(
        series=[
            Series(
                name=_named(name, row.outcome.layers),
                points=[(float(n), float(e)) for n, e in enumerate(row.outcome.layers, 1)],
                line=True,
                dashed=control,
            )
            for name, row, control in named
        ],
        x_label="layer",
        y_label="relative error of hidden states",
        log=True,
        by_layer=True,
    )


def names_of(rows: Sequence[Row]) -> list[str]:
    """The rows' names: their weights, their caches, or both."""
    weights, caches = [row.weights for row in rows], [row.kv_cache for row in rows]
    if len(set(weights)) == len(rows) > 1:
        return weights
    if len(set(caches)) == len(rows) > 1 and len(set(weights)) == 1:
        return caches
    return [row.label for row in rows]


def frontier(points: Sequence[tuple[float, float]]) -> Iterator[int]:
    """Which points no other beats in both coordinates."""
    for i, (x, y) in enumerate(points):
        others = (other for j, other in enumerate(points) if j != i)
        beaten = any(u <= x and v <= y and (u, v) != (x, y) for u, v in others)
        if math.isfinite(y) and not beaten:
            yield i


def _named(name: str, values: Iterable[float]) -> str:
    """What cannot be drawn is named in the legend."""
    return name if any(map(math.isfinite, values)) else f"{name} (not finite)"


def _limits(found: Evaluation) -> Iterator[tuple[str, float]]:
    """Horizontal lines: the control, and the threshold."""
    control, asked = found.control.measures.kl, found.thresholds.max_kl
    if math.isfinite(control) and control > 0:
        yield "control: a layer spoiled", control
    if asked is not None and asked > 0:
        yield f"--max-kl {asked:g}", asked


def _verdict(found: Evaluation) -> str:
    """The verdict; empty if there is no threshold and nothing failed."""
    lines = "".join(f"<li>{on_page(failure)}</li>" for failure in found.failures)
    said = f'<ul class="bad">{lines}</ul>' if lines else ""
    if not found.thresholds.any:
        return said
    if len(found.rows) == 1 or found.recommended is None:
        return said or '<p class="good">within all thresholds</p>'
    best = on_page(found.recommended.label)
    return f'{said}<p class="good">smallest within the thresholds: {best}</p>'


def shown_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return f"<p>{on_page(title)}</p>{table(columns, rows, numbers=len(columns) - 1)}"
