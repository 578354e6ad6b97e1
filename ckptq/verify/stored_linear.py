"""A quantized Linear of the checkpoint under test, by runs and blocks of rows.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.models.encoded import Encoded
from ckptq.quantize.stored import stored
from ckptq.spec import TensorSpec
from ckptq.verify.subject import Module

if TYPE_CHECKING:
    from torch import Tensor

RUN_ELEMENTS = 1 << 22
"""Elements that are read at once: 8 MB of bf16."""

BLOCK_ELEMENTS = 1 << 18
"""Elements that are compared at once, so that they stay in a core's cache."""

Held = Mapping[str, "Tensor"]
"""The stored tensors that belong to some rows, by local name."""


@dataclass(frozen=True, kw_only=True)
class StoredLinear(Encoded):
    """A Linear whose tensors are all there, in the shapes that its scheme wants."""

    module: Module

    def runs(self, elements: int = RUN_ELEMENTS) -> list[tuple[int, int]]:
        """Spans of rows of about so many elements, starting at multiples of the quantum."""
        R, C = self.shape
        step = max(elements // C // self.quantum, 1) * self.quantum
        return [(start, min(start + step, R)) for start in range(0, R, step)]

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Spans of rows within a run that stay in the cache."""
        step = max(BLOCK_ELEMENTS // self.shape[1] // self.quantum, 1) * self.quantum
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def cut(self, held: Held, first: int, start: int, stop: int) -> dict[str, Tensor]:
        """Of what was read from row `first` on, that which belongs to rows start..stop."""
        made = {}
        for local, tensor in held.items():
            if self.dims(local) == 1:
                made[local] = tensor
                continue
            offset, _ = self.span(local, first, first)
            low, high = self.span(local, start, stop)
            made[local] = tensor[low - offset : high - offset]
        return made


def stored_linear(module: Module) -> StoredLinear:
    """From a module that `check_tensors` has nothing against."""
    scheme, shape = module.scheme, module.shape
    assert scheme is not None
    assert shape is not None
    spec = TensorSpec("BF16", shape)
    tensors = {n: module.tensors[n] for n in stored(spec, scheme) if n in module.tensors}
    return StoredLinear(name=module.name, tensors=tensors, scheme=scheme, spec=spec, module=module)
