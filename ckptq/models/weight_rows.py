"""Rows of a weight, however the checkpoint stores it.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, Memory
from ckptq.checkpoint.view import View, read_rows, read_slab, window
from ckptq.models.encoded import Encoded, Held, HeldWhole, Take, decode, decode_rows
from ckptq.models.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

Rows = Callable[[int, int], "Tensor"]
"""(start, stop) -> these rows [stop - start, C]."""


def weight_rows(files: Files, weight: Weight, memory: Memory | None = None) -> Rows:
    """Reads rows of a weight, dequantized where it is stored quantized; one that does not stream
    is held whole. In `memory`, where it is given, rows last until the thread's next call."""
    if isinstance(weight, HeldWhole):
        return decoded_rows(weight, weight.hold(files))
    if isinstance(weight, Encoded):
        return _on_quantum(weight, partial(decode_rows, files, weight))
    if weight.streams:
        return lambda start, stop: read_rows(files, weight, start, stop, memory)
    return rows_of(window(read_slab(files, weight), weight))


def whole_weight(take: Take, weight: Weight) -> Tensor:
    """[R, C], dequantized where it is stored quantized, on the device of what `take` gives.

    Maybe a window on that: not to be written to.
    """
    if isinstance(weight, Encoded):
        return decode(weight, weight.whole(take), weight.shape[0])
    return place_of(take(weight.stored), weight).contiguous()


def stored_of(weight: Weight) -> list[StoredTensor]:
    """The stored tensors that `whole_weight` takes."""
    return list(weight.tensors.values()) if isinstance(weight, Encoded) else [weight.stored]


def place_of(stored: Tensor, view: View) -> Tensor:
    """The view's [R, C] as a strided window on its stored tensor; copies nothing."""
    _, index, first, last = view.slab
    matrix = stored if index is None else stored[index]
    return window(matrix[first:last], view)


def rows_of(matrix: Tensor) -> Rows:
    """Rows of what is in memory."""
    return lambda start, stop: matrix[start:stop].contiguous()


def decoded_rows(weight: HeldWhole, held: Held) -> Rows:
    """Rows of a quantized weight whose stored tensors are in memory."""

    def rows(start: int, stop: int) -> Tensor:
        return decode(weight, weight.cut(held, start, stop), stop - start)

    return _on_quantum(weight, rows)


def _on_quantum(weight: Encoded, aligned: Rows) -> Rows:
    """From any row on, though only multiples of the quantum can be read."""

    def rows(start: int, stop: int) -> Tensor:
        first = start // weight.quantum * weight.quantum
        last = min(-(-stop // weight.quantum) * weight.quantum, weight.spec.shape[0])
        return aligned(first, last)[start - first : stop - first]

    return rows
