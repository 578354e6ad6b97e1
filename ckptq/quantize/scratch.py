"""Work on a weight in blocks of rows that fit a CPU's cache, in memory that one leaves to the next.

Fresh memory of this size goes back to the system when it is freed and is faulted in again when it
is asked for, which takes longer than all the arithmetic on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block: with fewer the calls cost more, with more they no longer fit the cache."""


def blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of `x` along its first dimension, in order; a single one on a GPU."""
    cached = x.device.type == "cpu"
    return x.split(max(BLOCK_ELEMENTS * len(x) // x.numel(), 1) if cached else len(x))


class Scratch:
    """Numbered lines of memory, each as large as the largest tensor that was asked of it."""

    def __init__(self) -> None:
        self._lines: dict[int, Tensor] = {}

    def line(self, index: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Line `index` in the shape of `x`. What it held before is lost."""
        nbytes = x.numel() * dtype.itemsize
        held = self._lines.get(index)
        if held is None or held.numel() < nbytes:
            held = self._lines[index] = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
        return held[:nbytes].view(dtype).view(x.shape)
