"""Signal and quantization noise of weights, summed where they are.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptq.verify.roundtrip.tally import decibels

if TYPE_CHECKING:
    from torch import Tensor


class Noise:
    """Sums over weights, each counted once. Read off at the end: that waits for the device."""

    def __init__(self) -> None:
        self._counted: set[str] = set()
        self._signal: Tensor | float = 0.0
        self._noise: Tensor | float = 0.0

    def count(self, linear: str, w_RC: Tensor, back_RC: Tensor) -> None:
        """Add a weight and what it became.

        On a CPU in float64. On a GPU squares are in float32, each off by at most 2^-22 of itself,
        and summed in float64, so the ratio is off by less than 10^-5 dB.
        """
        import torch

        if linear in self._counted:
            return
        self._counted.add(linear)
        wide = torch.float64 if w_RC.device.type == "cpu" else torch.float32
        signal, noise = w_RC.to(wide), w_RC.to(wide) - back_RC.to(wide)
        self._signal = self._signal + signal.square().sum(dtype=torch.float64)
        self._noise = self._noise + noise.square().sum(dtype=torch.float64)

    @property
    def db(self) -> float | None:
        """Signal to noise so far; None before the first weight."""
        return decibels(float(self._signal), float(self._noise)) if self._counted else None
