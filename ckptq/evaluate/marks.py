"""What a chart is drawn from, in pixels with y down, and the two ways to draw it: SVG and PNG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptq.printable import on_page

FONT_SIZE = 11
CHARACTER = 6.7
"""Width of a character, more than it is on average: what is measured with it does not collide."""
LINE = 14
"""Height of a line of text."""

INK, FAINT, GRID = "#111827", "#6b7280", "#e5e7eb"

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stroke:
    """Straight lines from point to point."""

    points: Sequence[Point]
    color: str = GRID
    width: float = 1.0
    dash: tuple[float, float] | None = None

    def svg(self) -> str:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)
        dash = f' stroke-dasharray="{self.dash[0]} {self.dash[1]}"' if self.dash else ""
        style = f'fill="none" stroke="{self.color}" stroke-width="{self.width}"{dash}'
        return f'<polyline points="{points}" {style}/>'

    def draw(self, axes: Any) -> None:
        style = (0, self.dash) if self.dash else "solid"
        xs, ys = zip(*self.points, strict=True)
        axes.plot(xs, ys, color=self.color, linewidth=self.width, linestyle=style)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """A measured point; `title` is what a pointer over it shows."""

    at: Point
    color: str
    title: str = ""

    def svg(self) -> str:
        x, y = self.at
        title = f"<title>{on_page(self.title)}</title>"
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{self.color}">{title}</circle>'

    def draw(self, axes: Any) -> None:
        axes.plot(*self.at, "o", color=self.color, markersize=6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """A line of text that starts, ends or has its middle at a point of its baseline."""

    at: Point
    text: str
    anchor: str = "start"
    color: str = INK
    upright: bool = False
    """Turned, to be read from below upwards."""

    def svg(self) -> str:
        x, y = self.at
        turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if self.upright else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{self.anchor}"'
        halo = 'stroke="#fff" stroke-width="3" paint-order="stroke"'
        return f'<text {place} {halo} fill="{self.color}"{turn}>{on_page(self.text)}</text>'

    def draw(self, axes: Any) -> None:
        from matplotlib.patheffects import withStroke

        side = {"start": "left", "middle": "center", "end": "right"}[self.anchor]
        axes.text(
            *self.at,
            self.text,
            color=self.color,
            fontsize=FONT_SIZE * 0.72,  # pixels to points, at 100 of them an inch
            horizontalalignment=side,
            verticalalignment="baseline",
            rotation=90 if self.upright else 0,
            rotation_mode="anchor",
            parse_math=False,
            path_effects=[withStroke(linewidth=2, foreground="#fff")],
        )


Mark = Stroke | Dot | Words


@dataclass(frozen=True, slots=True)
class Drawing:
    """Marks, the later ones on top."""

    width: float
    height: float
    marks: Sequence[Mark]

    def svg(self) -> str:
        """On white, as its inks want it."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:.0f} '
            f'{self.height:.0f}" font-family="Helvetica, Arial, sans-serif" '
            f'font-size="{FONT_SIZE}"><rect width="100%" height="100%" fill="#fff"/>'
            + "".join(mark.svg() for mark in self.marks)
            + "</svg>"
        )

    def png(self, file: Path) -> None:
        """Twice as large as the SVG says, by matplotlib, which has to be there."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width / 100, self.height / 100), dpi=200)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        axes.set_axis_off()
        for mark in self.marks:
            mark.draw(axes)
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": "ckptq"})


@dataclass(frozen=True, slots=True)
class Box:
    """What a text or a point covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return not (
            self.right <= other.left
            or other.right <= self.left
            or self.bottom <= other.top
            or other.bottom <= self.top
        )

    def within(self, other: Box) -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )


def box_of(words: Words) -> Box:
    """The room that a line of text takes, roughly."""
    width = CHARACTER * len(words.text)
    left = words.at[0] - {"start": 0.0, "middle": width / 2, "end": width}[words.anchor]
    return Box(left, words.at[1] - LINE + 3, left + width, words.at[1] + 3)


def free(words: Words, taken: Iterable[Box], room: Box) -> bool:
    """Whether a text has a place of its own."""
    own = box_of(words)
    return own.within(room) and not any(own.meets(box) for box in taken)
