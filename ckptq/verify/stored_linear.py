"""A quantized Linear on disk, read by blocks of rows; its source's rows beside it.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_range, read_tensor
from ckptq.checkpoint.view import read_rows, read_slab, window
from ckptq.models.encoded import Encoded, decode_rows
from ckptq.models.weight import Weight
from ckptq.quantize.scheme import WeightScheme
from ckptq.quantize.stored import row_quantum, stored
from ckptq.spec import TensorSpec
from ckptq.verify.subject import Module

if TYPE_CHECKING:
    from torch import Tensor

RUN_ELEMENTS = 1 << 22
"""Elements that are read at once: 8 MB of bf16."""

BLOCK_ELEMENTS = 1 << 18
"""Elements that are compared at once, so that they stay in a core's cache."""

Rows = Callable[[int, int], "Tensor"]
"""(start, stop) -> these rows [stop - start, C]."""

Held = Mapping[str, "Tensor"]
"""The stored tensors that belong to some rows, by local name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLinear:
    """A Linear whose tensors are all there, in the shapes that its scheme wants."""

    module: Module
    scheme: WeightScheme
    shape: tuple[int, int]
    tensors: Mapping[str, StoredTensor]
    """Those that its scheme names."""
    per_quantum: Mapping[str, int | None]
    """Local name -> rows of it that one quantum of weight rows makes; None: no rows."""

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def quantum(self) -> int:
        return row_quantum(self.scheme)

    def runs(self, elements: int = RUN_ELEMENTS) -> list[tuple[int, int]]:
        """Spans of rows of about so many elements, starting at multiples of the quantum."""
        R, C = self.shape
        step = max(elements // C // self.quantum, 1) * self.quantum
        return [(start, min(start + step, R)) for start in range(0, R, step)]

    def read(self, files: Files, start: int, stop: int) -> dict[str, Tensor]:
        """Everything stored for rows start..stop; start is a multiple of the quantum."""
        return {
            local: self._read(files, local, tensor, start, stop)
            for local, tensor in self.tensors.items()
        }

    def _read(
        self, files: Files, local: str, tensor: StoredTensor, start: int, stop: int
    ) -> Tensor:
        per = self.per_quantum[local]
        if per is None:
            return read_tensor(tensor, files).reshape(-1)
        first, last = self._span(per, start, stop, tensor.spec.shape[0])
        return read_range(files, tensor, first, last)

    def _span(self, per: int, start: int, stop: int, rows: int) -> tuple[int, int]:
        last = -(-stop * per // self.quantum) if stop % self.quantum == 0 else rows
        return start * per // self.quantum, min(last, rows)

    def cut(self, held: Held, first: int, start: int, stop: int) -> dict[str, Tensor]:
        """Of what was read from row `first` on, that which belongs to rows start..stop."""
        made = {}
        for local, tensor in held.items():
            per = self.per_quantum[local]
            if per is None:
                made[local] = tensor
                continue
            low, high = self._span(per, start, stop, self.tensors[local].spec.shape[0])
            offset = first * per // self.quantum
            made[local] = tensor[low - offset : high - offset]
        return made


def stored_linear(module: Module) -> StoredLinear:
    """From a module that `check_tensors` has nothing against."""
    assert module.group is not None
    scheme = module.group.scheme
    assert scheme is not None
    shape = module.shape
    assert shape is not None
    wanted = stored(TensorSpec("BF16", shape), scheme)
    quantum = stored(TensorSpec("BF16", (row_quantum(scheme), shape[1])), scheme)
    return StoredLinear(
        module=module,
        scheme=scheme,
        shape=shape,
        tensors={local: module.tensors[local] for local in wanted if local in module.tensors},
        per_quantum={
            local: None if len(spec.shape) == 1 else quantum[local].shape[0]
            for local, spec in wanted.items()
        },
    )


def source_rows(files: Files, weight: Weight) -> Rows:
    """Reads rows of a source weight; one that does not stream is held whole."""
    if isinstance(weight, Encoded):
        return _decoded_rows(files, weight)
    if weight.streams:
        return lambda start, stop: read_rows(files, weight, start, stop)
    return rows_of(window(read_slab(files, weight), weight))


def _decoded_rows(files: Files, weight: Encoded) -> Rows:
    """Rows of a source that is itself quantized, as the weights that it stands for."""

    def rows(start: int, stop: int) -> Tensor:
        first = start // weight.quantum * weight.quantum
        last = min(-(-stop // weight.quantum) * weight.quantum, weight.spec.shape[0])
        return decode_rows(files, weight, first, last)[start - first : stop - first]

    return rows


def rows_of(matrix: Tensor) -> Rows:
    """Rows of what is in memory."""
    return lambda start, stop: matrix[start:stop].contiguous()


def blocks(linear: StoredLinear, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Spans of rows within a run that stay in the cache."""
    step = max(BLOCK_ELEMENTS // linear.shape[1] // linear.quantum, 1) * linear.quantum
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
