"""Small plots as SVG text: points over a numbered axis, a log or linear scale, lines for limits.

No script, no network, no fonts beyond the reader's: a report must open anywhere, in ten years too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckptq.printable import on_page

WIDTH, HEIGHT = 880, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 30
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
"""Told apart in print and by most kinds of colour blindness; then the same with other marks."""

MARKS = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8"',
    '<path d="M{x:.1f} {y:.1f}m-2.6 -2.6h5.2v5.2h-5.2z"',
    '<path d="M{x:.1f} {y:.1f}m0 -3.6l3.6 3.6l-3.6 3.6l-3.6 -3.6z"',
    '<path d="M{x:.1f} {y:.1f}m0 -3.4l3.4 6h-6.8z"',
)
"""Circle, square, diamond, triangle."""

SPREAD = 0.5
"""Of the distance between layers: series stand side by side, not on top of each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points of one colour."""

    name: str
    points: Sequence[tuple[float, float, str]]
    """(x, y, what a reader sees on pointing at it)"""
    line: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """From numbers to places along one direction."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        low, high, at = (self._scaled(v) for v in (self.low, self.high, value))
        return 0.5 if high == low else (at - low) / (high - low)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """Four to eight round numbers."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            step = max((last - first) // 6, 1)
            return [
                10.0**n for n in range(first, last + 1, step) if self.low <= 10.0**n <= self.high
            ]
        width = _round_step((self.high - self.low) / 5)
        least = math.ceil(self.low / width)
        count = min(int((self.high - self.low) / width) + 2, 20)
        return [n * width for n in range(least, least + count) if n * width <= self.high]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough or m == 10)


def plot(series: Sequence[Series], *, y_label: str, x_label: str, log: bool = False) -> str:
    """All series over one pair of axes; "" where there is nothing finite to show."""
    ys = [y for one in series for _, y, _ in one.points if _shown(y, log)]
    xs = [x for one in series for x, y, _ in one.points if _shown(y, log)]
    if not ys:
        return ""
    y_axis = _padded(min(ys), max(ys), log)
    x_axis = Axis(low=min(xs) - 0.5, high=max(xs) + 0.5)
    parts = [_frame(y_axis, x_axis, y_label, x_label)]
    places = [(index + 0.5) / len(series) - 0.5 for index in range(len(series))]
    for index, one in enumerate(series):
        aside = 0.0 if one.line else SPREAD * places[index]
        parts.append(_drawn(one, index, x_axis, y_axis, log, aside))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{on_page(y_label)}">'
        f"{''.join(parts)}</svg>{_legend(series)}"
    )


def _shown(y: float, log: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not log)


def _padded(low: float, high: float, log: bool) -> Axis:
    if log:
        return Axis(low=low / 1.6, high=high * 1.6, log=True)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Axis(low=low - margin, high=high + margin)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _frame(y_axis: Axis, x_axis: Axis, y_label: str, x_label: str) -> str:
    lines = []
    for tick in y_axis.ticks():
        y = _y(y_axis, tick)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{tick:.4g}</text>')
    for tick in x_axis.ticks():
        if tick == int(tick):
            x = _x(x_axis, tick)
            lines.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" class="mid">{int(tick)}</text>'
            )
    lines.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" class="end">{on_page(x_label)}</text>'
    )
    lines.append(f'<text x="{LEFT}" y="{TOP - 3}">{on_page(y_label)}</text>')
    return "".join(lines)


def _drawn(one: Series, index: int, x_axis: Axis, y_axis: Axis, log: bool, aside: float) -> str:
    colour = COLOURS[index % len(COLOURS)]
    places = [
        (_x(x_axis, x + aside), _y(y_axis, y), said) for x, y, said in one.points if _shown(y, log)
    ]
    if one.line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    return "".join(
        f"<g>{_mark(index, x, y)}<title>{on_page(said)}</title></g>" for x, y, said in places
    )


def _mark(index: int, x: float, y: float) -> str:
    shape = MARKS[index // len(COLOURS) % len(MARKS)].format(x=x, y=y)
    return f'{shape} fill="{COLOURS[index % len(COLOURS)]}" fill-opacity="0.8"/>'


def _legend(series: Sequence[Series]) -> str:
    items = (
        f'<span><svg viewBox="0 0 10 10">{_sample(one, index)}</svg>{on_page(one.name)}</span>'
        for index, one in enumerate(series)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _sample(one: Series, index: int) -> str:
    if not one.line:
        return _mark(index, 5, 5)
    colour = COLOURS[index % len(COLOURS)]
    return f'<path d="M0 5h10" stroke="{colour}" stroke-width="2"/>'
