"""Some columns of a weight, all its rows, in memory: what hypotheses are tried on.

Shape letters: R rows, K columns of the sample, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from ckptq.checkpoint.read import Files
from ckptq.models.weight_rows import weight_rows
from ckptq.verify.roundtrip import nearest
from ckptq.verify.roundtrip.tally import floor_db, snr_db
from ckptq.verify.roundtrip.undo import Undo
from ckptq.verify.stored_linear import Held, StoredLinear

COLUMNS = 256
"""Enough to tell any two weights apart."""

ELEMENTS = 1 << 24
"""Bounds the sample of a matrix with very many rows: 64 MB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A Linear's source and what is stored for it, in their first columns."""

    linear: StoredLinear
    w_RK: Tensor
    """float32."""
    held: Held

    @property
    def columns(self) -> int:
        return self.w_RK.shape[1]

    @property
    def floor(self) -> float:
        """What the right tensors reach."""
        return floor_db(self.linear.scheme, self.linear.shape)

    def snr(self, held: Held | None = None, against: Tensor | None = None) -> float:
        """How well these tensors (its own, if not given) stand for a weight (its own)."""
        return snr_db(self.weights(held), self.w_RK if against is None else against)

    def weights(self, held: Held | None = None) -> Tensor:
        """[R, K] float32: what stored tensors stand for."""
        return nearest.weights(held or self.held, self.linear.scheme, self.columns)

    def with_tensors(self, **changed: Tensor) -> dict[str, Tensor]:
        """What is held, with some of it exchanged."""
        return {**self.held, **changed}


def read_sample(linear: StoredLinear, files: Files, undo: Undo) -> Sample:
    """Read all rows run by run, and keep their first columns."""
    origin = linear.module.origin
    assert origin is not None
    R = linear.shape[0]
    K = sample_columns(linear)
    rows = weight_rows(files, origin.weight)
    source = [rows(start, stop)[:, :K].float() for start, stop in linear.runs()]
    if undo.module(linear.name, linear.tensors):
        whole = linear.read(files, 0, R)
        held = crop({k: undo.restore(f"{linear.name}.{k}", t) for k, t in whole.items()}, linear, K)
    else:
        held = _joined([crop(linear.read(files, *run), linear, K) for run in linear.runs()], linear)
    return Sample(linear=linear, w_RK=torch.cat(source), held=held)


def sample_columns(linear: StoredLinear) -> int:
    """A multiple of groups, blocks and packed words."""
    R, C = linear.shape
    scheme = linear.scheme
    width = scheme.block_structure[1] if scheme.block_structure else scheme.group_size or 1
    quantum = lcm(width, 32)
    wanted = max(min(COLUMNS, ELEMENTS // R) // quantum, 1) * quantum
    return min(wanted, C)


def crop(held: Held, linear: StoredLinear, columns: int) -> dict[str, Tensor]:
    """The part of stored tensors that belongs to the first columns."""
    C, scheme = linear.shape[1], linear.scheme
    if columns >= C:
        return dict(held)
    made = {}
    for local, tensor in held.items():
        if linear.dims(local) == 1 or tensor.shape[1] == 1:
            made[local] = tensor
        elif local == "weight_packed":
            per_byte = scheme.num_bits * columns // 8
            made[local] = tensor[:, : per_byte // tensor.element_size()]
        elif local == "weight":
            made[local] = tensor[:, :columns]
        else:
            width = scheme.block_structure[1] if scheme.block_structure else scheme.group_size or C
            made[local] = tensor[:, : columns // width]
    return {local: tensor.clone() for local, tensor in made.items()}


def _joined(parts: list[dict[str, Tensor]], linear: StoredLinear) -> dict[str, Tensor]:
    return {
        local: tensor if linear.dims(local) == 1 else torch.cat([part[local] for part in parts])
        for local, tensor in parts[0].items()
    }


def rows_of_source(sample: Sample, files: Files, count: int) -> Tensor:
    """The first rows of the source, all columns, float32: a sample of its transpose."""
    origin = sample.linear.module.origin
    assert origin is not None
    return weight_rows(files, origin.weight)(0, count).float()
