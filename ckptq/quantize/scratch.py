"""Work on a weight in blocks of rows that fit a CPU's cache, in memory that one leaves to the next.

Fresh memory of this size goes back to the system when it is freed and is faulted in again when it
is asked for, which takes longer than all the arithmetic on it.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block: with fewer the calls cost more, with more they no longer fit the cache."""


def block_length(x: Tensor, elements: int | None = None) -> int:
    """How much of the first dimension of `x` makes a block; all of it on a GPU."""
    cached = x.device.type == "cpu"
    return max((elements or BLOCK_ELEMENTS) * len(x) // x.numel(), 1) if cached else len(x)


def blocks(x: Tensor, elements: int | None = None) -> tuple[Tensor, ...]:
    """The blocks of `x` in order."""
    return x.split(block_length(x, elements))


class Scratch(threading.local):
    """Named pieces of memory, each as large as the largest tensor that was asked of it.

    Every thread has pieces of its own. Belongs to one device. `block_elements` is how much is
    worked on at a time, where that is not BLOCK_ELEMENTS.
    """

    def __init__(
        self, device: torch.device | str = "cpu", block_elements: int | None = None
    ) -> None:
        self.device = torch.device(device)
        self.block_elements = block_elements
        self._pieces: dict[str, Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A dense tensor of unknown content. What this thread last got by this name is lost."""
        nbytes = prod(shape) * dtype.itemsize
        held = self._pieces.get(name)
        if held is None or held.numel() < nbytes:
            held = self._pieces[name] = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return held[:nbytes].view(dtype).view(shape)
