"""Observers: folds that turn the values seen in a tensor into one scale per head or per tensor.

A statistic is a dict of tensors, so that it can be saved, compared and merged. Empty is `{}`;
`fold` adds a batch; `merge` joins two halves; `scale` reads the result off. Padding never counts.

    static_minmax   the running minimum and maximum, independent of order and batches.
    minmax          llm-compressor's default: an exponential average of the batches' extremes.
    percentile      the magnitude below which a given share of all values lies.
    mse             the shrunken maximum with the smallest FP8 rounding error.

The last two count every magnitude by its bf16 bit pattern, which is exact for bf16 activations.

Shape letters: B batch, H heads (1 when the whole tensor shares a scale), S positions, D head size,
N the 32768 magnitudes of bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ckptq.errors import UsageError

Strategy = Literal["attn_head", "tensor"]
Stats = Mapping[str, "Tensor"]

FP8_MAX = 448.0
INT8_MAX = 127.5
"""Half the range of codes, as compressed-tensors divides; not the largest code."""
NVFP4_MAX = 448.0 * 6.0
"""Largest E4M3 scale of a group by the largest E2M1 code: what a global scale aims at."""
MAGNITUDES = 1 << 15


@dataclass(frozen=True)
class Observer:
    """The true running minimum and maximum: llm-compressor's `static_minmax`, bit for bit.

    The other observers change parts of it.
    """

    name: str = "static_minmax"

    def fold(self, stats: Stats, x_BHSD: Tensor, lengths: Sequence[int]) -> Stats:
        """Add one batch, of which the first `lengths[b]` positions of row b are real."""
        return self.merge(stats, extremes(x_BHSD, lengths))

    def merge(self, one: Stats, other: Stats) -> Stats:
        """The statistic of both halves together."""
        if not one or not other:
            return one or other
        return {
            "amin": torch.minimum(one["amin"], other["amin"]),
            "amax": torch.maximum(one["amax"], other["amax"]),
        }

    def magnitude(self, stats: Stats) -> Tensor:
        """What counts as the largest magnitude per head, [H]."""
        return torch.maximum(stats["amin"].abs(), stats["amax"].abs())

    def scale(self, stats: Stats, dtype: torch.dtype, top: float = FP8_MAX) -> Tensor:
        """The dequantization multiplier per head, [H], finite and positive: magnitude / top."""
        return scale_of(self.magnitude(stats), dtype, top)


@dataclass(frozen=True)
class MinMax(Observer):
    """llm-compressor's `minmax`, bit for bit: each batch moves the extremes by a constant share.

    Depends on the order and size of the batches, and ends far below the true maximum, which clips.
    """

    averaging_constant: float = 0.01
    name: str = "minmax"

    def fold(self, stats: Stats, x_BHSD: Tensor, lengths: Sequence[int]) -> Stats:
        seen, share = extremes(x_BHSD, lengths), self.averaging_constant
        if not stats:
            return seen
        return {key: stats[key] * (1.0 - share) + seen[key] * share for key in seen}

    def merge(self, one: Stats, other: Stats) -> Stats:
        if one and other:
            raise UsageError(
                "observer 'minmax' depends on the order of batches, so halves cannot be merged; "
                "use 'static_minmax'"
            )
        return one or other


@dataclass(frozen=True)
class Counted(Observer):
    """Counts every magnitude besides."""

    def fold(self, stats: Stats, x_BHSD: Tensor, lengths: Sequence[int]) -> Stats:
        H = x_BHSD.shape[1]
        counts_HN = torch.stack([_counts(piece) for piece in _real(x_BHSD, lengths)]).sum(0)
        seen = {**extremes(x_BHSD, lengths), "counts": counts_HN.reshape(H, MAGNITUDES).cpu()}
        return self.merge(stats, seen)

    def merge(self, one: Stats, other: Stats) -> Stats:
        if not one or not other:
            return one or other
        return {**super().merge(one, other), "counts": one["counts"] + other["counts"]}


@dataclass(frozen=True)
class Percentile(Counted):
    """The smallest magnitude that at least `percentile` % of the values do not exceed."""

    percentile: float = 99.99
    name: str = "percentile"

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise UsageError(f"percentile must lie in (0, 100], got {self.percentile}")

    def magnitude(self, stats: Stats) -> Tensor:
        below_HN = stats["counts"].cumsum(-1)
        wanted_H1 = (below_HN[:, -1:].double() * (self.percentile / 100)).ceil()
        index_H = torch.searchsorted(below_HN.double(), wanted_H1).squeeze(-1)
        return _bf16_magnitudes()[index_H]


@dataclass(frozen=True)
class MSE(Counted):
    """The share of the maximum, from 1 down to 1 - maxshrink, that FP8 rounds with least error.

    Shares are 1 / grid apart. The error is the sum of |x - fp8(x)| ** norm over all values of all
    batches; of equals the largest share wins. (llm-compressor's `mse` searches each batch, stops
    early and averages the batches exponentially.)
    """

    maxshrink: float = 0.2
    grid: float = 100.0
    norm: float = 2.4
    name: str = "mse"

    def magnitude(self, stats: Stats) -> Tensor:
        raise UsageError("observer 'mse' searches scales for FP8 only; use 'static_minmax'")

    def scale(self, stats: Stats, dtype: torch.dtype, top: float = FP8_MAX) -> Tensor:
        if top != FP8_MAX:
            raise UsageError("observer 'mse' searches scales for FP8 only; use 'static_minmax'")
        amax_H = super().magnitude(stats).float()
        best_H = torch.full_like(amax_H, float("inf"), dtype=torch.float64)
        result_H = torch.zeros_like(amax_H, dtype=dtype)
        for step in range(int(self.maxshrink * self.grid) + 1):
            scale_H = scale_of(amax_H * (1 - step / self.grid), dtype)
            error_H = _rounding_error(stats["counts"], scale_H.float(), self.norm)
            better_H = error_H < best_H
            best_H = torch.where(better_H, error_H, best_H)
            result_H = torch.where(better_H, scale_H, result_H)
        return result_H


OBSERVERS: dict[str, type[Observer]] = {
    "static_minmax": Observer,
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": MSE,
}


def make_observer(name: str, arguments: Mapping[str, Any] | None = None) -> Observer:
    """The observer of that name, with `observer_kwargs` as in llm-compressor."""
    if name not in OBSERVERS:
        raise UsageError(f"unknown observer {name!r}; known: {', '.join(OBSERVERS)}")
    chosen, given = OBSERVERS[name], dict(arguments or {})
    known = [f.name for f in fields(chosen) if f.name != "name"]
    if unknown := sorted(given.keys() - set(known)):
        raise UsageError(
            f"observer {name!r} has no argument {unknown[0]!r}; known: {', '.join(known) or 'none'}"
        )
    return chosen(**given)


def heads(x_BHSD: Tensor, strategy: Strategy) -> Tensor:
    """The tensor as one head when a whole tensor shares a scale, else as it is."""
    return x_BHSD if strategy == "attn_head" else x_BHSD.transpose(1, 2).flatten(2).unsqueeze(1)


def extremes(x_BHSD: Tensor, lengths: Sequence[int]) -> Stats:
    """Lowest and highest value of the real positions of one batch, each [H]."""
    pieces = list(_real(x_BHSD, lengths))
    amin_BH = torch.stack([x.amin((0, 2, 3)) for x in pieces])
    amax_BH = torch.stack([x.amax((0, 2, 3)) for x in pieces])
    return {"amin": amin_BH.amin(0).cpu(), "amax": amax_BH.amax(0).cpu()}


def scale_of(amax_H: Tensor, dtype: torch.dtype, top: float = FP8_MAX) -> Tensor:
    """amax / top in `dtype`; 0 becomes its eps (compressed-tensors' `calculate_qparams`)."""
    scale_H = amax_H.to(dtype) / torch.tensor(top, dtype=dtype, device=amax_H.device)
    return torch.where(scale_H == 0, torch.finfo(dtype).eps, scale_H)


def _real(x_BHSD: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    """The parts without padding, as views: the whole batch where nothing is padded."""
    if all(length == x_BHSD.shape[2] for length in lengths):
        yield x_BHSD
    else:
        for row, length in enumerate(lengths):
            yield x_BHSD[row : row + 1, :, :length]


def _counts(x_BHSD: Tensor) -> Tensor:
    """How often each magnitude occurs per head, [H * N] int64."""
    H = x_BHSD.shape[1]
    bits_BHSD = x_BHSD.abs().to(torch.bfloat16).view(torch.int16).long()
    head_H11 = torch.arange(H, device=x_BHSD.device).reshape(H, 1, 1) * MAGNITUDES
    return torch.bincount((bits_BHSD + head_H11).reshape(-1), minlength=H * MAGNITUDES)


def _bf16_magnitudes() -> Tensor:
    """Every non-negative bf16 by its bit pattern, [N] fp32; the last ones are Inf and NaN."""
    return torch.arange(MAGNITUDES, dtype=torch.int16).view(torch.bfloat16).float()


def _rounding_error(counts_HN: Tensor, scale_H: Tensor, norm: float) -> Tensor:
    """Sum of |x - fp8(x)| ** norm per head, [H] fp64."""
    used_N = counts_HN.sum(0) > 0
    x_N = _bf16_magnitudes()[used_N]
    scale_H1 = scale_H.unsqueeze(-1)
    code_HN = (x_N / scale_H1).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    error_HN = (x_N - code_HN.float() * scale_H1).abs().double() ** norm
    return (error_HN * counts_HN[:, used_N]).sum(-1)
