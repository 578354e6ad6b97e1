"""A quantized weight in memory, as an engine holds it.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ckptq.quantize.weight_scheme import WeightScheme


@dataclass(frozen=True, slots=True)
class Coded:
    """The stored tensors of one Linear [R, C], by local name, on the device that computes."""

    tensors: Mapping[str, Tensor]
    scheme: WeightScheme
    shape: tuple[int, int]


Keep = Callable[[str, Coded], None]
"""Gets the name of a Linear and its codes, when its weight is loaded."""
