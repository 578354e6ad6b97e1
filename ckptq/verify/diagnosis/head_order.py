"""Whole heads, or only their scales, in the wrong order.

Shape letters: H heads, N elements of a head, D rows of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ckptq.rope_order import Heads
from ckptq.verify.diagnosis.sample import Sample
from ckptq.verify.roundtrip.tally import snr_db


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMatch:
    """For each head the one that stands in its place."""

    scales_only: bool
    order: tuple[int, ...]
    snr_db: float


def match_heads(sample: Sample, heads: Heads, scales_only: bool) -> Iterator[HeadMatch]:
    """Which head's rows, or scales alone, fit where: only where not each fits best in its place."""
    if heads.rows != sample.linear.shape[0] or heads.count < 2:
        return
    made = [_scales_of_heads(sample, heads)]
    if not scales_only:
        made.append(_whole_heads(sample, heads))
    yield from (match for match in made if match is not None)


def _whole_heads(sample: Sample, heads: Heads) -> HeadMatch | None:
    found_HN = sample.weights().reshape(heads.count, -1)
    wanted_HN = sample.w_RK.reshape(heads.count, -1)
    distance_HH = torch.cdist(wanted_HN, found_HN)
    order = distance_HH.argmin(1).tolist()
    if order == list(range(heads.count)):
        return None
    wanted, found = sample.w_RK, found_HN[order].reshape(sample.w_RK.shape)
    return HeadMatch(scales_only=False, order=tuple(order), snr_db=snr_db(found, wanted))


def _scales_of_heads(sample: Sample, heads: Heads) -> HeadMatch | None:
    """Scales of head j on the codes of head i, for all i and j."""
    scale = sample.held["weight_scale"]
    if scale.ndim != 2 or scale.shape[0] != heads.rows:
        return None
    H, D = heads.count, heads.head_dim
    best = torch.full((H,), torch.inf)
    order = list(range(H))
    for shift in range(H):
        turned = torch.arange(H).roll(-shift)
        held = sample.with_tensors(weight_scale=scale.unflatten(0, (H, D))[turned].flatten(0, 1))
        noise_H = (sample.weights(held) - sample.w_RK).square().reshape(H, -1).sum(1)
        for head in (noise_H < best).nonzero().flatten().tolist():
            best[head], order[head] = noise_H[head], int(turned[head])
    if order == list(range(H)):
        return None
    held = sample.with_tensors(weight_scale=scale.unflatten(0, (H, D))[order].flatten(0, 1))
    return HeadMatch(
        scales_only=True, order=tuple(order), snr_db=snr_db(sample.weights(held), sample.w_RK)
    )
