"""Rescaling between a layer's tensors, as in SmoothQuant and AWQ: it must cancel out.

They divide what makes an activation (a norm's weight, or the rows of v_proj and up_proj) by a
number for each channel, and multiply the columns of the Linears that read it. Columns were found
rescaled; here their partners are looked for, which are right if the product of both factors is 1.

Shape letters: R rows, K columns of a sample, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ckptq.checkpoint.read import read_tensor
from ckptq.models.family import LAYER
from ckptq.spec import FLOATS
from ckptq.verify.diagnosis.diagnose import Case
from ckptq.verify.diagnosis.sample import Sample
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding

TOLERANCE, OUTER = 0.03, 0.25
"""Of the product of two factors against 1: within the first for half of the channels, within the
second for 19 of 20, because factors are measured on quantized weights."""

TOLD = 0.75
"""Share of a column's codes that are not zero."""

PARTNERS = {"copy-differs", "scale-wrong", "scale-corrupt", "weight-wrong"}
"""Codes that such a partner gets when looked at alone."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Rescaled columns of one Linear."""

    name: str
    factor_K: Tensor
    error_K: Tensor
    told_K: Tensor
    """Whether enough codes of a column are not zero to tell its factor: beside columns that are
    hundreds of times as large, one in the same group vanishes."""
    channels: int


def settle(case: Case, found: list[Finding]) -> list[Finding]:
    """Partners whose rescaling cancels out become notes, uncompensated columns a fault."""
    readers = [f for f in found if f.code == "columns-rescaled"]
    if not readers:
        return found
    columns = {_module(f): _columns(case.sample(_module(f))) for f in readers}
    partners: dict[str, list[str]] = {}
    for one in found:
        if one.code in PARTNERS and one.tensor:
            partners.setdefault(_layer(one.tensor), []).append(one.tensor)
    undone: dict[str, str] = {}
    for name, reader in columns.items():
        for partner in partners.get(_layer(name), ()):
            if _cancels(case, partner, reader):
                undone[name] = partner
    settled = set(undone.values())
    return [_settled(one, undone, settled) for one in found]


def _module(one: Finding) -> str:
    return (one.tensor or "").rpartition(".")[0]


def _settled(one: Finding, undone: dict[str, str], settled: set[str]) -> Finding:
    if one.code == "columns-rescaled" and _module(one) not in undone:
        found = f"{one.found}; no norm or rows before it compensate"
        wrong = finding("columns-unbalanced", one.tensor, found=found, wanted=one.wanted)
        return replace(wrong, file=one.file)
    if one.code in PARTNERS and one.tensor in settled:
        found = f"{one.found}; compensated in the columns that read it"
        note = finding("columns-rescaled", one.tensor, found=found, wanted=one.wanted)
        return replace(note, file=one.file)
    return one


def _cancels(case: Case, partner: str, reader: Columns) -> bool:
    products = (
        factor_C[: len(reader.factor_K)] * reader.factor_K
        for factor_C in _factors(case, partner, reader)
    )
    told_K = reader.told_K
    error_K = reader.error_K[told_K]
    return any(near_one(product[told_K], error_K) for product in products if told_K.any())


def near_one(product_K: Tensor, error_K: Tensor) -> bool:
    """Whether factors cancel out, as far as quantized weights tell them."""
    off_K = ((product_K - 1).abs() - error_K).nan_to_num(nan=torch.inf)
    half, most = off_K.median(), off_K.kthvalue(max(int(0.95 * len(off_K)), 1)).values
    return bool(half < TOLERANCE and most < OUTER)


def _columns(sample: Sample) -> Columns:
    found = sample.weights()
    told_K = (found != 0).float().mean(0) >= TOLD
    factor_K, error_K = factors(found, sample.w_RK)
    return Columns(sample.linear.name, factor_K, error_K, told_K, sample.linear.shape[1])


def factors(found_RK: Tensor, wanted_RK: Tensor) -> tuple[Tensor, Tensor]:
    """[K] and [K]: each column's factor by least squares, and its standard error over it."""
    square_K = wanted_RK.square().sum(0).clamp(min=1e-30)
    factor_K = (found_RK * wanted_RK).sum(0) / square_K
    noise_K = (found_RK - wanted_RK * factor_K).square().mean(0)
    return factor_K, (noise_K / square_K).sqrt() / factor_K.abs().clamp(min=1e-30)


def _layer(name: str) -> str:
    match = LAYER.match(name)
    return f"{match['prefix']}.{match['index']}" if match else ""


def _factors(case: Case, tensor: str, reader: Columns) -> Iterator[Tensor]:
    """Stored over source, one number a channel: of a norm's weight, or of the rows of a Linear."""
    subject = case.subject
    assert subject.source is not None
    module = tensor.rpartition(".")[0]
    if module in case.linears:
        beside = module.rpartition(".")[0] == reader.name.rpartition(".")[0]
        if beside and module in case.tallies and case.linears[module].shape[0] == reader.channels:
            sample = case.sample(module)
            dot_R = (sample.weights() * sample.w_RK).sum(1)
            yield dot_R / sample.w_RK.square().sum(1).clamp(min=1e-30)
        return
    ours, theirs = subject.ckpt.tensors.get(tensor), subject.source.tensors.get(tensor)
    if ours is None or theirs is None or ours.spec.shape != (reader.channels,):
        return
    if ours.spec.dtype in FLOATS and theirs.spec == ours.spec:
        stored, source = (read_tensor(t, case.files).float() for t in (ours, theirs))
        yield torch.where(source == 0, torch.nan, stored / source)
