"""Quality against bytes, and errors layer by layer, as SVG: no library, no script, no network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ckptq.evaluate.result import Evaluation

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 200, 16, 52
COLORS = ("#1f6feb", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0f766e", "#a16207", "#334155")
SMALLEST = 1e-7
"""Where a logarithmic axis ends: a divergence of zero is drawn there."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points that share a color, and a name."""

    name: str
    points: Sequence[tuple[float, float]]


def bytes_series(found: Evaluation) -> list[Series]:
    """One point a row: megabytes, KL."""
    return [Series(row.label, [(row.nbytes / 1e6, row.measures.kl)]) for row in found.rows]


def layer_series(found: Evaluation) -> list[Series]:
    """One line a row: layer, relative error; the control last."""
    rows = [*((row.label, row) for row in found.rows), ("control: a layer spoiled", found.control)]
    return [
        Series(name, list(enumerate(map(float, row.outcome.layers), start=1))) for name, row in rows
    ]


def chart(series: Sequence[Series], x_title: str, y_title: str) -> str:
    """An SVG, y logarithmic; what is not finite is left out, and the key says so."""
    shown = [p for each in series for p in each.points if math.isfinite(p[1])]
    if not shown:
        return ""
    x_axis = _Linear(min(p[0] for p in shown), max(p[0] for p in shown))
    y_axis = _Log(min(p[1] for p in shown), max(p[1] for p in shown))
    parts = [
        *_grid(x_axis, y_axis, x_title, y_title),
        *(part for n, each in enumerate(series) for part in _drawn(n, each, x_axis, y_axis)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
        f'{max(HEIGHT, TOP + 20 * len(series) + 10)}" font-family="sans-serif" font-size="12">'
        + "".join(parts)
        + "</svg>"
    )


class _Linear:
    """Values to horizontal pixels."""

    def __init__(self, low: float, high: float) -> None:
        room = (high - low or abs(high) or 1.0) * 0.06
        self.low, self.high = low - room, high + room

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def ticks(self) -> Iterable[tuple[float, str]]:
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
        at = math.ceil(self.low / step)
        while at * step <= self.high:
            yield self.place(at * step), f"{at * step:g}"
            at += 1


class _Log:
    """Values to vertical pixels, a decade as high as the next."""

    def __init__(self, low: float, high: float) -> None:
        self.low = math.floor(math.log10(max(low, SMALLEST)))
        self.high = max(math.ceil(math.log10(max(high, SMALLEST))), self.low + 1)

    def place(self, value: float) -> float:
        share = (math.log10(max(value, SMALLEST)) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> Iterable[tuple[float, str]]:
        for power in range(self.low, self.high + 1):
            yield self.place(10.0**power), f"1e{power}"


def _grid(x_axis: _Linear, y_axis: _Log, x_title: str, y_title: str) -> Iterable[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for x, text in x_axis.ticks():
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#e5e7eb"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>'
    for y, text in y_axis.ticks():
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e5e7eb"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    middle = (TOP + bottom) / 2
    x_middle = (LEFT + right) / 2
    yield f'<text x="{x_middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_title)}</text>'
    turn = f'transform="rotate(-90 16 {middle})"'
    yield f'<text x="16" y="{middle}" text-anchor="middle" {turn}>{escape(y_title)}</text>'


def _drawn(number: int, series: Series, x_axis: _Linear, y_axis: _Log) -> Iterable[str]:
    color = COLORS[number % len(COLORS)]
    points = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points if math.isfinite(y)]
    if len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'
    for (x, y), (_, value) in zip(points, series.points, strict=False):
        title = f"<title>{escape(series.name)}: {value:.4g}</title>"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}">{title}</circle>'
    lost = "" if len(points) == len(series.points) else " (not finite)"
    x, y = WIDTH - RIGHT + 14, TOP + 14 + 20 * number
    yield f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{color}"/>'
    yield f'<text x="{x + 16}" y="{y}">{escape(series.name + lost)}</text>'
