"""Charts by matplotlib, as SVG text for a page or as a PNG.

Names come from checkpoints, so matplotlib must not parse them as mathematics.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.printable import on_page, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (9.0, 3.4)
"""Inches, without the legend."""
LEGEND_LINE = 0.19
"""Inches per name in the legend."""
MARKERS = "osD^vPX*"
LIMITS = (":", "--")
COLORS = 10
"""Colors before matplotlib repeats them; then the next marker is used."""
SPREAD = 0.5
"""Share of the distance between whole numbers over which series are spread side by side."""
MOST_SHAPES = 4000
"""Points of a series beyond which they are drawn as a bitmap."""

SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "ckptq", "font.size": 9.0}
"""Keeps text as text, and the same chart byte-identical."""
NAMES = re.compile(r' id="[A-Za-z0-9.]+_\d+"')
"""Ids that matplotlib gives its groups: repeated in every chart of a page, and never used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points, or a line through them, with one color and name."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = False
    dashed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Series over one pair of axes. Values that are not finite are left out; with `log`, zero is
    drawn below the smallest positive value."""

    series: Sequence[Series]
    x_label: str
    y_label: str
    log: bool = False
    by_layer: bool = False
    """Whether x counts layers: whole numbers, points of several series side by side."""
    limits: Sequence[tuple[str, float]] = ()
    """(name, y) of horizontal lines."""

    @property
    def empty(self) -> bool:
        return not any(self.shown(one) for one in self.series)

    def shown(self, one: Series) -> list[tuple[float, float]]:
        """The points of a series that can be drawn."""
        return [
            (x, y)
            for x, y in one.points
            if math.isfinite(x) and math.isfinite(y) and (y >= 0 or not self.log)
        ]


def svg(chart: Chart) -> str:
    """The chart as one <svg> element; "" if there is nothing to show."""
    if chart.empty:
        return ""
    file = io.StringIO()
    with _settings():
        # none of what matplotlib would write about itself
        about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        _figure(chart).savefig(file, format="svg", bbox_inches="tight", metadata=about)
    drawn = NAMES.sub("", file.getvalue())
    label = on_page(f"{chart.y_label} by {chart.x_label}")
    return drawn[drawn.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def png(chart: Chart, file: Path) -> None:
    """The chart as a PNG, twice as large."""
    with _settings():
        _figure(chart).savefig(
            file, format="png", dpi=200, bbox_inches="tight", metadata={"Software": "ckptq"}
        )


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that its font lacks; the reader's may not
        yield


def _figure(chart: Chart) -> Figure:
    from matplotlib.figure import Figure

    lines = len(chart.series) + len(chart.limits)
    figure = Figure(figsize=(SIZE[0], max(SIZE[1], LEGEND_LINE * lines)))
    axes = figure.add_subplot()
    handles = [_draw(axes, chart, number) for number in range(len(chart.series))]
    for number, (_, y) in enumerate(chart.limits):
        handles.append(axes.axhline(y, color="0.3", linestyle=LIMITS[number % 2], linewidth=1))
    _scale(axes, chart)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel(printable(chart.x_label), parse_math=False)
    axes.set_ylabel(printable(chart.y_label), parse_math=False)
    names = [printable(one.name) for one in chart.series] + [name for name, _ in chart.limits]
    legend = axes.legend(
        handles, names, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0,
        frameon=False,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _draw(axes: Axes, chart: Chart, number: int) -> Any:
    """Draw one series; returns its handle for the legend."""
    one = chart.series[number]
    points = chart.shown(one)
    aside = SPREAD * ((number + 0.5) / len(chart.series) - 0.5)
    if one.line or not chart.by_layer:
        aside = 0.0
    xs, ys = [x + aside for x, _ in points], [y for _, y in points]
    color = "0.5" if one.dashed else f"C{number % COLORS}"
    if one.line:
        dots = "." if len(points) == 1 else ""
        style = "--" if one.dashed else "-"
        return axes.plot(xs, ys, linestyle=style, marker=dots, color=color, linewidth=1.3)[0]
    marker = MARKERS[number // COLORS % len(MARKERS)]
    return axes.plot(
        xs, ys, linestyle="", marker=marker, color=color, markersize=4, alpha=0.8,
        rasterized=len(points) > MOST_SHAPES,
    )[0]  # fmt: skip


def _scale(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    if chart.by_layer:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not chart.log:
        return
    values = [y for one in chart.series for _, y in chart.shown(one)]
    positive = [y for y in values if y > 0]
    if len(positive) == len(values):
        axes.set_yscale("log")
    elif positive:
        axes.set_yscale("symlog", linthresh=min(positive))
