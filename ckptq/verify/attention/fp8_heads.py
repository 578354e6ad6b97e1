"""What FP8 with given scales does to q, k and v, head by head.

Shape letters: B batch, H heads, S positions, D head size, N numbers of one head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ckptq.quantize.scales import E4M3_MAX


def in_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """The values as a cache returns them: divided, clamped, rounded to E4M3, multiplied; float32.

    `scale` is broadcast over `x`.
    """
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.float() * scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """Three sets of scales for the heads of one tensor, [H] each."""

    stored: Tensor

    @property
    def unscaled(self) -> Tensor:
        """1.0, which engines use for a scale that is missing."""
        return torch.ones_like(self.stored)

    @property
    def shared(self) -> Tensor:
        """One for all heads: the largest, as a scale per tensor would be."""
        return self.stored.amax().expand_as(self.stored)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.stored, self.unscaled, self.shared


@dataclass(slots=True)
class HeadSums:
    """A fold over batches: start empty, `add` each, read off."""

    choices: Choices
    amax_H: Tensor = field(init=False)
    square_H: Tensor = field(init=False)
    noise_3H: Tensor = field(init=False)
    """For the stored scales, 1.0, and one scale for all."""
    counted: int = 0
    nonzero_H: Tensor = field(init=False)
    saturated_H: Tensor = field(init=False)
    underflowed_H: Tensor = field(init=False)

    def __post_init__(self) -> None:
        zeros = torch.zeros(len(self.choices.stored), dtype=torch.float64)
        self.amax_H, self.square_H = zeros.clone(), zeros.clone()
        self.noise_3H = torch.zeros(3, len(zeros), dtype=torch.float64)
        self.nonzero_H, self.saturated_H = zeros.clone(), zeros.clone()
        self.underflowed_H = zeros.clone()

    def add(self, x_BHSD: Tensor) -> None:
        """One batch of q, k or v, summed where it is."""
        x_HN = x_BHSD.detach().float().transpose(0, 1).flatten(1)
        self.amax_H = self.amax_H.maximum(x_HN.abs().amax(1).cpu())
        self.square_H += x_HN.double().square().sum(1).cpu()
        for index, scale_H in enumerate(self.choices.all()):
            y_HN = in_fp8(x_HN, scale_H[:, None].to(x_HN.device))
            self.noise_3H[index] += (y_HN - x_HN).double().square().sum(1).cpu()
            if index == 0:
                self.underflowed_H += ((y_HN == 0) & (x_HN != 0)).sum(1).cpu()
        self.counted += x_HN.shape[1]
        self.nonzero_H += (x_HN != 0).sum(1).cpu()
        limit_H1 = E4M3_MAX * self.choices.stored[:, None].to(x_HN.device)
        self.saturated_H += (x_HN.abs() > limit_H1).sum(1).cpu()

    @property
    def errors_3H(self) -> Tensor:
        """Relative error of each head: root of noise over signal energy."""
        return (self.noise_3H / self.square_H.clamp(min=1e-300)).sqrt()


@dataclass(slots=True)
class OutputSums:
    """Relative error of one layer's attention output, for the three choices of scales."""

    square: float = 0.0
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def add(self, exact: Tensor, others: list[Tensor]) -> None:
        wide = exact.double()
        self.square += wide.square().sum().item()
        for index, other in enumerate(others):
            self.noise[index] += (other.double() - wide).square().sum().item()

    @property
    def errors(self) -> tuple[float, float, float]:
        a, b, c = ((n / max(self.square, 1e-300)) ** 0.5 for n in self.noise)
        return a, b, c
