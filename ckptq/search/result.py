"""What a search found: the scheme of each set, its size, and what else the sizes would give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptq.search.candidates import LinearSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """One set, and why it has its scheme: what each would cost and store."""

    name: str
    linears: tuple[str, ...]
    scheme: str
    weights: int
    bits: float
    loss: float
    losses: dict[str, float]
    """Scheme -> loss, of those that could be chosen."""

    @classmethod
    def of(cls, each: LinearSet, scheme: str, losses: dict[str, float]) -> Chosen:
        return cls(
            name=each.name,
            linears=each.linears,
            scheme=scheme,
            weights=each.weights,
            bits=each.bits(scheme),
            loss=losses[scheme],
            losses=losses,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A whole model: bits per weight of its Linears, all bytes of its tensors, its loss."""

    name: str
    bits: float
    nbytes: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A whole model that was run: its estimate, and what was measured."""

    point: Point
    kl: float
    """Mean over tokens, in nats, as `evaluate` has it."""
    accuracy: float | None
    """Share of the task's questions answered exactly; None without a task."""
    holds: bool
    """Whether it is within the limits that were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePoint:
    """A cache of all layers, by its name for `evaluate --kv-cache`."""

    name: str
    bits: float
    """Per cached value, on average."""
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenCache:
    """One format, and the layers that stay in 16 bits."""

    cache: str
    skipped: tuple[int, ...]
    point: CachePoint
    uniform: tuple[CachePoint, ...]
    """Every format in all layers."""
    flags: str
    """What `vllm serve` needs beside the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One search."""

    model: str
    """The folder or hub id that was asked for."""
    recipe: Path
    sensitivities: Path
    measure: str
    """What losses are, in words."""
    text: str | None
    chosen: tuple[Chosen, ...]
    total: Point
    uniform: tuple[Point, ...]
    """Every scheme by itself, where it fits."""
    best: tuple[Point, ...]
    """The least loss at other sizes, smallest first."""
    told: tuple[str, ...]
    tried: tuple[Trial, ...] = ()
    """Plans that were run, smallest first."""
    kv_cache: ChosenCache | None = None
