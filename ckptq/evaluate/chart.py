"""Quality against bytes, and errors layer by layer: what goes where on the two charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ckptq.evaluate.axes import Linear, Log
from ckptq.evaluate.marks import (
    FAINT,
    INK,
    LINE,
    Box,
    Dot,
    Drawing,
    Mark,
    Point,
    Stroke,
    Words,
    box_of,
    free,
)
from ckptq.evaluate.result import Evaluation, Row

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 30, 48
NAMES = 190
"""Room on the right for names at the ends of lines."""
BEST, OTHER, LIMIT = "#1d4ed8", "#9ca3af", "#b91c1c"
COLORS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#be185d", "#0f766e", "#a16207", "#334155")
NEAR = (
    *((10, 4, "start"), (-10, 4, "end"), (0, -9, "middle"), (0, 18, "middle")),
    *((8, -8, "start"), (8, 16, "start"), (-8, -8, "end"), (-8, 16, "end")),
)
FAR = tuple(
    place
    for r in (22, 36, 50, 64)
    for place in (
        *((r, 4 - r, "start"), (r, 4 + r, "start"), (-r, 4 - r, "end"), (-r, 4 + r, "end")),
        *((0, 4 - r, "middle"), (0, 4 + r, "middle"), (r, 4, "start"), (-r, 4, "end")),
    )
)
"""Where a point's name may be, in pixels from it, the best place first."""


def names_of(rows: Sequence[Row]) -> list[str]:
    """What tells the rows apart: their weights, their caches, or both."""
    weights, caches = [row.weights for row in rows], [row.kv_cache for row in rows]
    if len(set(weights)) == len(rows) > 1:
        return weights
    if len(set(caches)) == len(rows) > 1 and len(set(weights)) == 1:
        return caches
    return [row.label for row in rows]


def quality_chart(found: Evaluation) -> Drawing:
    """KL of every row against the bytes of its weights, or, where all have the same weights, the
    bits of a cached value. Blue are those that no other row beats in both."""
    rows, names = found.rows, names_of(found.rows)
    same = len({row.nbytes for row in rows}) == 1 and len({row.cache_bits for row in rows}) > 1
    xs = [row.cache_bits if same else row.nbytes / 1e6 for row in rows]
    x_title = "cache, bits a value" if same else "size, MB"
    kls = [row.measures.kl for row in rows]
    lines = _limits(found)
    x_axis = Linear.over(xs, LEFT, WIDTH - RIGHT, margin=0.12)
    y_axis = Log.over([*kls, *(value for value, _, _ in lines)], HEIGHT - BOTTOM, TOP)
    marks: list[Mark] = [*_frame(x_axis, y_axis, x_title, "KL divergence, nats")]
    best = set(frontier(list(zip(xs, kls, strict=True))))
    places = {
        i: (x_axis.place(x), y_axis.place(kl))
        for i, (x, kl) in enumerate(zip(xs, kls, strict=True))
        if math.isfinite(kl)
    }
    taken = [_around(place) for place in places.values()]
    if len(best) > 1:
        line = Stroke(points=sorted(places[i] for i in best), color=BEST, width=1.2)
        marks.append(line)
        taken += _along(line)
    for value, text, color in lines:
        marks += _across(y_axis.place(value), text, color, taken)
    for i, place in places.items():
        color = BEST if i in best else OTHER
        marks.append(Dot(at=place, color=color, title=f"{rows[i].label}: KL {kls[i]:.4g}"))
    first = sorted(places, key=lambda i: i not in best)
    marks += _named({names[i]: places[i] for i in first}, taken, {names[i] for i in best})
    lost = [name for i, name in enumerate(names) if i not in places]
    marks.append(_above(lost, "blue: no other row is both smaller and nearer to the source"))
    return Drawing(WIDTH, HEIGHT, marks)


def layer_chart(found: Evaluation) -> Drawing:
    """Error of the hidden states after every layer, a line a row; the control is dashed."""
    named = [*zip(names_of(found.rows), found.rows, strict=True)]
    named.append(("control: a layer spoiled", found.control))
    errors = {name: [float(e) for e in row.outcome.layers] for name, row in named}
    height = max(HEIGHT, TOP + BOTTOM + LINE * len(named))
    layers = range(1, max(map(len, errors.values()), default=1) + 1)
    x_axis = Linear.over(list(layers), LEFT, WIDTH - RIGHT - NAMES, margin=0.03, whole=True)
    y_axis = Log.over([e for each in errors.values() for e in each], height - BOTTOM, TOP)
    marks: list[Mark] = [
        *_frame(x_axis, y_axis, "layer", "relative error of hidden states", height)
    ]
    ends: list[tuple[Point, str, str]] = []
    for number, (name, values) in enumerate(errors.items()):
        control = number == len(errors) - 1
        color = FAINT if control else COLORS[number % len(COLORS)]
        dash = (5.0, 4.0) if control else None if number < len(COLORS) else (2.0, 2.0)
        points = [
            (x_axis.place(layer), y_axis.place(value))
            for layer, value in zip(layers, values, strict=False)
            if math.isfinite(value)
        ]
        if len(points) > 1:
            marks.append(Stroke(points=points, color=color, width=1.6, dash=dash))
        elif points:
            marks.append(Dot(at=points[0], color=color, title=name))
        if points:
            ends.append((points[-1], name, color))
    lost = [name for name, values in errors.items() if not any(map(math.isfinite, values))]
    marks += _beside(ends, WIDTH - RIGHT - NAMES, height)
    marks.append(_above(lost, "a mean over tokens"))
    return Drawing(WIDTH, height, marks)


def frontier(points: Sequence[Point]) -> Iterator[int]:
    """Which points are beaten by none in one coordinate without losing in the other."""
    for i, (x, y) in enumerate(points):
        others = (other for j, other in enumerate(points) if j != i)
        beaten = any(u <= x and v <= y and (u, v) != (x, y) for u, v in others)
        if math.isfinite(y) and not beaten:
            yield i


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights as near to `wanted` as a distance of `gap` and the ends allow, in the same order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        floor = placed[i] = max(wanted[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        ceiling = placed[i] = min(placed[i], ceiling)
        ceiling -= gap
    return placed


def _limits(found: Evaluation) -> list[tuple[float, str, str]]:
    """Lines across: what was asked for, and how bad a broken model is. (KL, text, color)"""
    lines = []
    control = found.control.measures.kl
    if math.isfinite(control) and control > 0:
        lines.append((control, "control: a layer spoiled", FAINT))
    if found.thresholds.max_kl is not None and found.thresholds.max_kl > 0:
        text = f"--max-kl {found.thresholds.max_kl:g}"
        lines.append((found.thresholds.max_kl, text, LIMIT))
    return lines


def _frame(
    x_axis: Linear, y_axis: Log, x_title: str, y_title: str, height: float = HEIGHT
) -> Iterator[Mark]:
    """Grid, ticks and titles."""
    bottom = height - BOTTOM
    for x, text in x_axis.ticks():
        yield Stroke(points=[(x, TOP), (x, bottom)])
        yield Words(at=(x, bottom + 16), text=text, anchor="middle", color=FAINT)
    for y, text in y_axis.ticks():
        yield Stroke(points=[(LEFT, y), (x_axis.end, y)])
        yield Words(at=(LEFT - 8, y + 4), text=text, anchor="end", color=FAINT)
    yield Words(at=((LEFT + x_axis.end) / 2, height - 12), text=x_title, anchor="middle")
    yield Words(at=(14, (TOP + bottom) / 2), text=y_title, anchor="middle", upright=True)


def _named(places: dict[str, Point], taken: list[Box], best: set[str]) -> Iterator[Mark]:
    """A name beside each point, where nothing else is; further away with a line to it."""
    room = Box(LEFT, TOP, WIDTH - 2, HEIGHT - BOTTOM + 6)
    for name, (x, y) in places.items():
        color = INK if name in best else FAINT
        tries = [
            Words(at=(x + dx, y + dy), text=name, anchor=anchor, color=color)
            for dx, dy, anchor in (*NEAR, *FAR)
        ]
        chosen = next((words for words in tries if free(words, taken, room)), tries[0])
        taken.append(box_of(chosen))
        if tries.index(chosen) >= len(NEAR):
            yield Stroke(points=[(x, y), (chosen.at[0], chosen.at[1] - 4)], color=OTHER, width=0.7)
        yield chosen


def _beside(ends: Sequence[tuple[Point, str, str]], x: float, height: float) -> Iterator[Mark]:
    """Names to the right of where lines end, one under the other."""
    heights = spread([y for (_, y), _, _ in ends], LINE, TOP + 4, height - BOTTOM)
    for (end, name, color), placed in zip(ends, heights, strict=True):
        yield Stroke(points=[end, (x, end[1]), (x + 14, placed)], color=color, width=0.7)
        yield Words(at=(x + 18, placed + 4), text=name, color=color)


def _above(lost: Sequence[str], text: str) -> Words:
    said = f"{text}; not finite: {', '.join(lost)}" if lost else text
    return Words(at=(LEFT, TOP - 12), text=said, color=FAINT)


def _across(y: float, text: str, color: str, taken: list[Box]) -> Iterator[Mark]:
    """A dashed line and its name on it, on the right if nothing else is there."""
    line = Stroke(points=[(LEFT, y), (WIDTH - RIGHT, y)], color=color, dash=(5, 4))
    right, middle = WIDTH - RIGHT - 4, (LEFT + WIDTH - RIGHT) / 2
    sides = ((right, "end"), (LEFT + 6, "start"), (middle, "middle"))
    tries = [
        Words(at=(x, y + dy), text=text, anchor=side, color=color)
        for dy in (-4, 13)
        for x, side in sides
    ]
    room = Box(LEFT, TOP, WIDTH, HEIGHT)
    chosen = next((words for words in tries if free(words, taken, room)), tries[0])
    taken += [box_of(chosen), *_along(line)]
    yield from (line, chosen)


def _along(line: Stroke) -> Iterator[Box]:
    """What a line covers, in steps so short that a slope is no large box."""
    for (x0, y0), (x1, y1) in pairwise(line.points):
        steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / 5))
        for n in range(steps + 1):
            x, y = x0 + (x1 - x0) * n / steps, y0 + (y1 - y0) * n / steps
            yield Box(x - 2, y - 2, x + 2, y + 2)


def _around(place: Point) -> Box:
    x, y = place
    return Box(x - 6, y - 6, x + 6, y + 6)
