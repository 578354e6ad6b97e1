"""The best choice within a budget, and at other sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ckptq.errors import UsageError
from ckptq.evaluate.result import Thresholds
from ckptq.printable import size
from ckptq.search.candidates import PLAIN, Candidates, LinearSet
from ckptq.search.result import Point
from ckptq.search.sensitivities import Losses
from ckptq.search.solve import Table, least

STEPS = 1 << 44
"""Losses are whole numbers of this part of the largest sum of them."""
SIZES = 24
"""At which the best is shown."""


@dataclass(frozen=True)
class Choices:
    """What can be chosen, and what each choice costs."""

    candidates: Candidates
    losses: Losses

    def within_bytes(self, nbytes: float) -> dict[str, str] | None:
        """Set -> scheme with the least loss, of those whose sets take no more bytes."""
        return self._named(least(self._costs, self._sizes, int(nbytes)))

    def point(self, name: str, chosen: Mapping[str, str]) -> Point:
        nbytes = sum(each.nbytes[chosen[each.name]] for each in self.candidates.sets)
        return Point(
            name=name,
            bits=8 * nbytes / self.candidates.weights,
            nbytes=nbytes + self.candidates.rest_bytes,
            loss=sum(self.losses[name][scheme] for name, scheme in chosen.items()),
        )

    def uniform(self) -> Iterator[Point]:
        """Every scheme by itself; what it does not fit has the scheme of most bits."""
        for scheme in self.candidates.plans:
            chosen = {
                each.name: scheme if scheme in self.losses[each.name] else self._largest(each)
                for each in self.candidates.sets
            }
            yield self.point(scheme, chosen)

    def best(self) -> Iterator[Point]:
        """The best of sizes between the smallest and the largest."""
        low, high = (sum(map(pick, self._sizes)) for pick in (min, max))
        for step in range(SIZES + 1):
            chosen = self.within_bytes(low + (high - low) * step / SIZES)
            assert chosen is not None
            yield self.point("", chosen)

    @property
    def smallest(self) -> Point:
        """The fewest bytes, whatever they lose."""
        chosen = self.within_bytes(sum(map(min, self._sizes)))
        assert chosen is not None
        return self.point("smallest", chosen)

    @property
    def closest(self) -> Point:
        """The least loss, whatever its size."""
        chosen = self.within_bytes(sum(map(max, self._sizes)))
        assert chosen is not None
        return self.point("closest", chosen)

    def _largest(self, each: LinearSet) -> str:
        return max(self.losses[each.name], key=each.nbytes.__getitem__)

    def _named(self, found: tuple[int, ...] | None) -> dict[str, str] | None:
        if found is None:
            return None
        pairs = zip(self.candidates.sets, found, strict=True)
        return {each.name: list(self.losses[each.name])[choice] for each, choice in pairs}

    @cached_property
    def _sizes(self) -> Table:
        return [
            [each.nbytes[scheme] for scheme in self.losses[each.name]]
            for each in self.candidates.sets
        ]

    @cached_property
    def _step(self) -> float:
        return sum(max(found.values()) for found in self.losses.values()) / STEPS or 1.0

    @cached_property
    def _costs(self) -> Table:
        """Losses as whole numbers."""
        return [
            [round(loss / self._step) for loss in self.losses[each.name].values()]
            for each in self.candidates.sets
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A size, or what has to hold when it is measured."""

    bits: float | None = None
    """Stored bits per weight of the Linears, on average."""
    nbytes: int | None = None
    """Of all tensors of the output."""
    max_kl: float | None = None
    min_accuracy: float | None = None
    """Of a task, as a share."""

    @property
    def measured(self) -> bool:
        """Whether plans have to be run."""
        return self.max_kl is not None or self.min_accuracy is not None

    def check(self) -> None:
        """UsageError unless it is one size or limits that have to hold, within their ranges."""
        sizes = [each for each in (self.bits, self.nbytes) if each is not None]
        if len(sizes) + self.measured != 1 or any(not 0 < each < math.inf for each in sizes):
            raise UsageError(
                "give one of --bits and --size, more than 0, or what has to hold: --max-kl, "
                "--min-accuracy or both"
            )
        Thresholds(max_kl=self.max_kl, min_accuracy=self.min_accuracy).check()

    def holds(self, kl: float, accuracy: float | None) -> bool:
        """Whether a plan is within the limits; NaN never is."""
        share = math.nan if accuracy is None else accuracy
        return (self.max_kl is None or kl <= self.max_kl) and (
            self.min_accuracy is None or share >= self.min_accuracy
        )

    def choose(self, choices: Choices) -> dict[str, str]:
        """Set -> scheme within a size. UsageError where nothing is, or nothing is quantized."""
        candidates = choices.candidates
        if self.nbytes is not None:
            limit, what = float(self.nbytes - candidates.rest_bytes), f"--size {size(self.nbytes)}"
        else:
            assert self.bits is not None
            limit, what = self.bits * candidates.weights / 8, f"--bits {self.bits:g}"
        chosen = choices.within_bytes(limit)
        if chosen is None:
            end = choices.smallest
            raise UsageError(
                f"{what}: no choice of {', '.join(candidates.plans)} is within it; the smallest "
                f"has {end.bits:.4f} bits per weight, {size(end.nbytes)}, and loses {end.loss:.4g}"
            )
        if set(chosen.values()) == {PLAIN}:
            raise UsageError(
                f"{what}: everything stays in {PLAIN}, so there is nothing to quantize"
            )
        return chosen
