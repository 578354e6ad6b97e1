"""An evaluation as a file to look at: HTML with its charts inside, an SVG, or a PNG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ckptq.checkpoint.write import write_text
from ckptq.errors import UsageError
from ckptq.evaluate.chart import bytes_series, chart, layer_series
from ckptq.evaluate.result import Evaluation

SUFFIXES = (".html", ".svg", ".png")
BYTES, KL, LAYER, ERROR = "size, MB", "KL divergence, nats", "layer", "relative error"

STYLE = """
body{font-family:sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#111}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f3f4f6}
.fail{color:#b91c1c}.ok{color:#15803d}svg{max-width:100%}
"""

Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""Title, columns, rows: as the console shows them."""


def check_report(file: Path) -> None:
    """UsageError, before anything is computed, for a file that could not be written at the end."""
    if file.suffix not in SUFFIXES:
        raise UsageError(f"--report {file}: wanted a name that ends in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise UsageError(f"--report {file}: {file.parent} is no folder")
    if file.suffix == ".png":
        _pyplot(file)


def write_report(file: Path, found: Evaluation, tables: Iterable[Table]) -> None:
    """What `--report` asks for, by the ending of the file's name."""
    if file.suffix == ".png":
        _write_png(file, found)
    elif file.suffix == ".svg":
        write_text(file, chart(bytes_series(found), BYTES, KL) + "\n")
    else:
        write_text(file, html(found, tables))


def html(found: Evaluation, tables: Iterable[Table]) -> str:
    """One file, without scripts."""
    verdict = '<p class="ok">within all thresholds</p>' if found.thresholds.any else ""
    if not found.ok:
        lines = "".join(f"<li>{escape(failure)}</li>" for failure in found.failures)
        verdict = f'<ul class="fail">{lines}</ul>'
    notes = "".join(f"<p>{escape(warning)}</p>" for warning in found.warnings)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>ckptq evaluate</title>"
        f"<style>{STYLE}</style><h1>{escape(found.source.weights)}</h1>{verdict}{notes}"
        + "".join(_table(*table) for table in tables)
        + f"<h2>Quality against bytes</h2>{chart(bytes_series(found), BYTES, KL)}"
        + f"<h2>Layer by layer</h2>{chart(layer_series(found), LAYER, ERROR)}</html>\n"
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<p>{escape(title)}</p><table><tr>{head}</tr>{body}</table>"


def _pyplot(file: Path) -> object:
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            f"--report {file}: a PNG needs matplotlib: pip install 'ckptq[plot]'; "
            ".svg and .html need nothing"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _write_png(file: Path, found: Evaluation) -> None:
    pyplot: object = _pyplot(file)
    figure, axes = pyplot.subplots(figsize=(8, 5))  # type: ignore[attr-defined]
    for series in bytes_series(found):
        (point,) = series.points
        axes.plot(*point, "o", label=series.name)
    axes.set(xlabel=BYTES, ylabel=KL, yscale="symlog" if _has_zero(found) else "log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)  # type: ignore[attr-defined]


def _has_zero(found: Evaluation) -> bool:
    return any(row.measures.kl == 0 for row in found.rows)
