"""Rows of a weight, however the checkpoint stores it.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, Memory
from ckptq.checkpoint.view import View, read_rows, read_slab, window
from ckptq.models.encoded import Encoded, Held, HeldWhole, Take, decode
from ckptq.models.weight import Weight

Rows = Callable[[int, int], "Tensor"]
"""(start, stop) -> these rows [stop - start, C]."""


def weight_rows(files: Files, weight: Weight, memory: Memory | None = None) -> Rows:
    """Reads rows of a weight, dequantized where it is stored quantized; one that does not stream
    is held whole. In `memory`, where it is given, rows last until the thread's next call."""
    if isinstance(weight, Encoded):
        return decoded_rows(files, weight)
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


Parts = Callable[[int, int], Mapping[str, "Tensor"]]
"""(start, stop) -> the parts of these rows; `start` is a multiple of the quantum."""


def parts_of(files: Files, weight: Encoded, held: Held | None = None) -> Parts:
    """What is stored for rows of a quantized weight. `held` are the tensors of one that does not
    stream, where they are in memory already; else they are read first, all of them."""
    if isinstance(weight, HeldWhole):
        return partial(weight.cut, weight.hold(files) if held is None else held)
    return partial(weight.read, files)


def _up(number: int, quantum: int) -> int:
    return -(-number // quantum) * quantum


Place = Callable[["Tensor"], "Tensor"]
"""Takes a tensor to the device where it is computed with."""


def decoded_rows(
    files: Files, weight: Encoded, held: Held | None = None, place: Place | None = None
) -> Rows:
    """Dequantized, from any row on, though only from multiples of the quantum can be read."""
    parts = placed(parts_of(files, weight, held), place)

    def rows(start: int, stop: int) -> Tensor:
        first = start // weight.quantum * weight.quantum
        last = stop if weight.streams else min(_up(stop, weight.quantum), weight.spec.shape[0])
        return decode(weight, parts(first, last), last - first)[start - first : stop - first]

    return rows


def placed(parts: Parts, place: Place | None) -> Parts:
    """The same parts where `place` takes them."""
    if place is None:
        return parts
    return lambda start, stop: {n: place(part) for n, part in parts(start, stop).items()}


def outermost_rows(files: Files, weight: Weight, place: Place | None = None) -> Rows | None:
    """For FP8 in blocks, rows with the same extremes as those from a multiple of the quantum on,
    NaN and Inf included: of each column of a block the outermost codes, dequantized. A pass over
    them takes a fourth of the time. None for other weights."""
    if type(weight) is not Encoded or weight.scheme.block_structure is None:
        return None
    if weight.stored.spec.dtype != "F8_E4M3":
        return None
    height, width = weight.scheme.block_structure
    scheme = replace(weight.scheme, block_structure=(2, width))
    parts_at = placed(parts_of(files, weight), place)

    def rows(start: int, stop: int) -> Tensor:
        parts = parts_at(start, stop)
        if (stop - start) % height:
            return decode(weight, parts, stop - start)
        code_MHC = parts["weight"].view(torch.uint8).unflatten(0, (-1, height))
        # of either sign, larger magnitudes are larger bytes: those below zero as unsigned ones
        pair_M2C = torch.stack((code_MHC.amax(1), code_MHC.view(torch.int8).amax(1).byte()), 1)
        code_RC = pair_M2C.flatten(0, 1).view(torch.float8_e4m3fn)
        spec = replace(weight.spec, shape=tuple(code_RC.shape))
        few = replace(weight, scheme=scheme, spec=spec)
        return decode(few, {**parts, "weight": code_RC}, len(code_RC))

    return rows
