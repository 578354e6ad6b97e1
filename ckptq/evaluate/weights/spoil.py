"""The control: a layer whose weights have their rows shifted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def spoiled_layer(layers: int) -> int:
    """Which layer the control spoils: the one in the middle."""
    return layers // 2


@contextmanager
def spoiled(layer: nn.Module) -> Iterator[None]:
    """In the block, every matrix of the layer has its rows shifted by one.

    The numbers and scales are the same, so only computing with them shows it.
    """
    matrices = [p for p in layer.parameters() if p.ndim >= 2]
    kept = [p.data for p in matrices]
    for parameter in matrices:
        parameter.data = parameter.data.roll(1, dims=-2)
    try:
        yield
    finally:
        for parameter, data in zip(matrices, kept, strict=True):
            parameter.data = data
