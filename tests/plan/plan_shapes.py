"""What the tests of plans make checkpoints of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Save = Callable[[Mapping[str, torch.Tensor], Mapping[str, Any]], Path]
"""Tensors and config -> the folder of the checkpoint."""


def weights(*shapes: tuple[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.05 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        for name, shape in shapes
    }
