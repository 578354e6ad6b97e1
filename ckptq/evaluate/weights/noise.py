"""Signal and quantization noise of weights, summed where they are.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptq.verify.roundtrip.tally import decibels


class Noise:
    """Sums over weights, each counted once. Read off at the end: that waits for the device."""

    def __init__(self) -> None:
        self._counted: set[str] = set()
        self._signal: Tensor | float = 0.0
        self._noise: Tensor | float = 0.0

    def count(self, linear: str, w_RC: Tensor, back_RC: Tensor) -> None:
        """Add a weight and what it became: on a CPU in float64, on a GPU in float32."""
        if linear in self._counted:
            return
        self._counted.add(linear)
        wide = torch.float64 if w_RC.device.type == "cpu" else torch.float32
        signal, noise = squares(w_RC, back_RC, wide)
        self._signal, self._noise = self._signal + signal, self._noise + noise

    @property
    def db(self) -> float | None:
        """Signal to noise so far; None before the first weight."""
        return decibels(float(self._signal), float(self._noise)) if self._counted else None


def squares(w_RC: Tensor, back_RC: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sums of w squared and of the error squared, in float64, of terms made in `wide`.

    In float32 each term is off by at most 2^-22 of itself, and so the ratio by 3 x 10^-6 dB.
    """
    signal = w_RC.to(wide).square().sum(dtype=torch.float64)
    noise = (w_RC.to(wide) - back_RC.to(wide)).square().sum(dtype=torch.float64)
    return signal, noise
