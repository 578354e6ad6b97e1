"""What a run is to tell of its layers: what their inputs did not decide on, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ckptq.printable import listed


@dataclass
class Told:
    """Of one layer, or of all."""

    nearest: list[str] = field(default_factory=list)
    """Linears that no token reached, rounded to nearest by their own values alone."""
    unsolved: list[str] = field(default_factory=list)
    """Linears whose Hessian cannot be inverted, rounded to nearest."""
    experts: dict[str, dict[int, int]] = field(default_factory=dict)
    """The first Linear of each module of experts -> expert -> tokens that it got."""

    massive: dict[str, int] = field(default_factory=dict)
    """Linear -> how many tokens are left out of its Hessian."""

    def add(self, other: Told) -> None:
        """What else is to be told of the same layer."""
        self.nearest += other.nearest
        self.unsolved += other.unsolved
        self.massive |= other.massive

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def together(layers: Sequence[Mapping[str, Any]]) -> Told:
    """What was told of each layer, as one."""
    every = [Told(**layer) for layer in layers]
    return Told(
        nearest=[name for told in every for name in told.nearest],
        unsolved=[name for told in every for name in told.unsolved],
        massive={name: count for told in every for name, count in told.massive.items()},
        experts={first: counts for told in every for first, counts in told.experts.items()},
    )


def lines_of(told: Told) -> Iterator[str]:
    """A line for the user about each."""
    if told.nearest:
        yield (
            f"no token of the calibration text reached {listed(told.nearest)}, so their "
            "weights are rounded by themselves; more text, or text from the model's domain, may "
            "reach them"
        )
    if told.unsolved:
        yield (
            f"the Hessian of {listed(told.unsolved)} cannot be inverted, so their weights "
            "are rounded by themselves; use more text, or a larger dampening_frac"
        )
    if told.massive:
        yield (
            f"massive activations in {listed(list(told.massive))}: "
            f"{sum(told.massive.values()):,} tokens outweigh all others of their text and are left "
            "out of what is gathered of their inputs"
        )
    counts = [count for each in told.experts.values() for count in each.values()]
    if counts:
        yield (
            f"{sum(map(bool, counts))} of {len(counts)} experts were reached, by "
            f"{min(counts):,} to {max(counts):,} tokens each"
        )
