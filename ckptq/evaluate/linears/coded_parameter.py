"""Where in a model's parameters the weights are whose codes are known.

A parameter is one Linear's weight, or holds many: gate and up side by side, experts one after the
other, each perhaps transposed. How they lie is found by comparing: codes belong to a part of a
parameter if they decode to it, so none is ever multiplied in another's place.

Shape letters: N output channels, C input features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor

from ckptq.quantize.coded import Coded
from ckptq.quantize.dispatch import dequantize

Parts = Mapping[int, Sequence[Coded]]
"""Where a matrix [N, C] begins in the parameter's storage -> the weights that it consists of, one
below the other."""

Order = tuple[bool, tuple[int, ...]]
"""Whether the matrix is stored transposed; which of its weights comes first, second, ..."""


def parts_of(parameter: Tensor, coded: Mapping[str, Coded]) -> Parts | None:
    """How a parameter [N, C], [E, N, C] or [E, C, N] consists of the weights of these Linears.

    None if it does not, or holds a number that none of them decodes to.
    """
    experts = _by_expert(coded)
    matrices = list(parameter) if parameter.ndim == 3 else [parameter]
    if len(matrices) != len(experts) or parameter.ndim not in (2, 3):
        return None
    order = next((o for o in _orders(experts[0]) if bool(_holds(matrices[0], experts[0], o))), None)
    if order is None:
        return None
    rest = zip(matrices[1:], experts[1:], strict=True)
    equal = [_holds(matrix, weights, order) for matrix, weights in rest]
    if equal and not bool(torch.stack(equal).all()):
        return None
    return {
        int(matrix.storage_offset()): [weights[at] for at in order[1]]
        for matrix, weights in zip(matrices, experts, strict=True)
    }


def _by_expert(coded: Mapping[str, Coded]) -> list[list[Coded]]:
    """The weights of each expert, experts by number. A lone Linear is an expert of its own."""
    found: dict[tuple[str, int], list[Coded]] = {}
    for name in sorted(coded):
        owner = name.rpartition(".")[0]
        prefix, _, number = owner.rpartition(".")
        key = (prefix, int(number)) if number.isdigit() else (owner, 0)
        found.setdefault(key, []).append(coded[name])
    return [found[key] for key in sorted(found)]


def _orders(weights: Sequence[Coded]) -> Iterator[Order]:
    for order in permutations(range(len(weights))):
        yield False, order
        yield True, order


def _holds(matrix: Tensor, weights: Sequence[Coded], order: Order) -> Tensor:
    """Whether a matrix is these weights in this order, on its device: reading it makes the host
    wait."""
    transposed, places = order
    matrix_NC = matrix.t() if transposed else matrix
    chosen = [weights[at] for at in places] if len(places) == len(weights) else []
    shape = (sum(each.shape[0] for each in chosen), *{each.shape[1] for each in chosen})
    if tuple(matrix_NC.shape) != shape:
        return torch.zeros((), dtype=torch.bool, device=matrix.device)
    parts = matrix_NC.split([each.shape[0] for each in chosen])
    pairs = zip(parts, chosen, strict=True)
    equal = [
        (part == dequantize(each.tensors, each.scheme, each.shape, matrix.dtype)).all()
        for part, each in pairs
    ]
    return torch.stack(equal).all()
