"""An evaluation as a file to look at: HTML with its charts inside, an SVG, or a PNG."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ckptq.errors import MachineError, UsageError
from ckptq.evaluate.chart import layer_chart, quality_chart
from ckptq.evaluate.result import Evaluation
from ckptq.files import text_bytes, write_whole
from ckptq.printable import on_page

SUFFIXES = (".html", ".svg", ".png")

STYLE = """
body{font:15px/1.5 Helvetica,Arial,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;
color:#111827;background:#fff}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;white-space:nowrap;
font-variant-numeric:tabular-nums}td,th{padding:.2rem .6rem;text-align:right}
th{border-bottom:1px solid #9ca3af}td:first-child,th:first-child{text-align:left}
tr:nth-child(even){background:#f3f4f6}.fail{color:#b91c1c}.ok{color:#15803d}
svg{width:100%;max-width:60rem;height:auto}
"""

Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""Title, columns, rows: as the console shows them."""


def check_report(file: Path) -> None:
    """Before anything is computed, for a file that could not be written at the end: UsageError for
    a name or place that is none, MachineError where the machine does not let it be written."""
    if file.suffix not in SUFFIXES:
        raise UsageError(f"--report {file}: wanted a name that ends in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise UsageError(f"--report {file}: {file.parent} is no folder")
    if file.is_dir():
        raise UsageError(f"--report {file}: is a folder")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise MachineError(f"--report {file}: cannot be written: {error.strerror}") from error
    if file.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            f"--report {file}: a PNG needs matplotlib: pip install 'ckptq[plot]'; "
            ".svg and .html need nothing"
        )


def write_report(file: Path, found: Evaluation, tables: Iterable[Table]) -> None:
    """What `--report` asks for, by the ending of the file's name."""
    if file.suffix == ".png":
        quality_chart(found).png(file)
    elif file.suffix == ".svg":
        write_whole(file, text_bytes(quality_chart(found).svg() + "\n"))
    else:
        write_whole(file, text_bytes(html(found, tables)))


def html(found: Evaluation, tables: Iterable[Table]) -> str:
    """One file, without scripts."""
    notes = "".join(f"<p>{on_page(warning)}</p>" for warning in found.warnings)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>ckptq evaluate {on_page(found.source.weights)}</title>"
        f"<style>{STYLE}</style><h1>ckptq evaluate: {on_page(found.source.weights)}</h1>"
        + _verdict(found)
        + notes
        + "".join(_table(*table) for table in tables)
        + f"<h2>Quality against bytes</h2>{quality_chart(found).svg()}"
        + f"<h2>Layer by layer</h2>{layer_chart(found).svg()}</html>\n"
    )


def _verdict(found: Evaluation) -> str:
    """What the thresholds say; nothing where none was given and nothing failed."""
    lines = "".join(f"<li>{on_page(failure)}</li>" for failure in found.failures)
    said = f'<ul class="fail">{lines}</ul>' if lines else ""
    if not found.thresholds.any:
        return said
    if len(found.rows) == 1 or found.recommended is None:
        return said or '<p class="ok">within all thresholds</p>'
    best = on_page(found.recommended.label)
    return f'{said}<p class="ok">smallest within the thresholds: {best}</p>'


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{on_page(column)}</th>" for column in columns)
    cells = ("".join(f"<td>{on_page(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<p>{on_page(title)}</p><div class='wide'><table><tr>{head}</tr>{body}</table></div>"
