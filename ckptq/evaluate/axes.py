"""From values to pixels: an even axis, and a logarithmic one that has a place for zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

ZERO_GAP = 30
"""Pixels between the lowest decade and zero."""


@dataclass(frozen=True, slots=True)
class Linear:
    """Values to pixels, evenly."""

    low: float
    high: float
    start: float
    end: float
    whole: bool = False

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        margin: float,
        whole: bool = False,
    ) -> Linear:
        """With room on both sides: `margin` of what is between the smallest and the largest."""
        low, high = min(values), max(values)
        room = (high - low or abs(high) or 1.0) * margin
        return cls(low - room, high + room, start, end, whole)

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
        step = max(1.0, step) if self.whole else step
        for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield self.place(n * step), f"{n * step:g}"


@dataclass(frozen=True, slots=True)
class Log:
    """Values to pixels, a decade as high as the next; zero lies on the bottom, under a gap."""

    low: int
    high: int
    bottom: float
    top: float
    zero: bool

    @classmethod
    def over(cls, values: Iterable[float], bottom: float, top: float) -> Log:
        """Whole decades around all values that are finite and positive."""
        finite = [value for value in values if math.isfinite(value)]
        positive = [value for value in finite if value > 0] or [1.0]
        low = math.floor(math.log10(min(positive)))
        high = max(math.ceil(math.log10(max(positive))), low + 1)
        return cls(low, high, bottom, top, len(positive) < len(finite))

    def place(self, value: float) -> float:
        bottom = self.bottom - (ZERO_GAP if self.zero else 0)
        if value <= 0:
            return self.bottom
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return bottom - share * (bottom - self.top)

    def ticks(self) -> Iterator[tuple[float, str]]:
        if self.zero:
            yield self.bottom, "0"
        every = math.ceil((self.high - self.low) / 8)
        for power in range(self.low, self.high + 1, every):
            yield self.place(10.0**power), f"{10.0**power:g}"
