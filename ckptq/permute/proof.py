"""Permutation-proof scales: q/k scales that no engine can spoil by forgetting to permute them.

Engines that permute q/k rows while loading do not all permute the scales (vLLM before PR 34243,
SGLang). If all rows that the permutation exchanges have one scale, permuted and unpermuted scales
are the same bytes, and such an engine is right too. Rows of small values then get a coarser step
than they need; `cost` says how much is lost.

Shape letters: R rows, N one or more columns of statistics, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptq.permute.apply import permute_rows
from ckptq.permute.order import Heads, RopeOrder, Sharing, cycles


def share_amax(amax_RN: Tensor, heads: Heads, sharing: Sharing = Sharing.CYCLE) -> Tensor:
    """Raise each row's statistic to the largest of the rows it shares a scale with; same shape.

    Give it max |w| by row [R, 1], or by row and group [R, G]; for an asymmetric format give it
    the maximum, and minus the minimum. Only copies values, so it is exact in any dtype, and a
    scale computed from the result in the usual way is proof.
    """
    set_R = _shared_sets(heads, sharing).to(amax_RN.device)
    index_RN = set_R[:, None].expand_as(amax_RN)
    largest_SN = torch.full_like(amax_RN[: int(set_R.max()) + 1], -torch.inf)
    return largest_SN.scatter_reduce(0, index_RN, amax_RN, "amax")[set_R]


def is_proof(scale_RN: Tensor, heads: Heads) -> bool:
    """Whether the permutation leaves these stored scales (or zero points) as they are."""
    moved_RN = permute_rows(scale_RN, heads, RopeOrder.HALF_SPLIT)
    return torch.equal(moved_RN.view(torch.uint8), scale_RN.contiguous().view(torch.uint8))


def _shared_sets(heads: Heads, sharing: Sharing) -> Tensor:
    """For each row the number of its set, [R]."""
    set_R = torch.arange(heads.rows) // heads.head_dim
    if sharing is Sharing.CYCLE:
        for number, rows in enumerate(cycles(heads)):
            set_R[rows] = number
    return set_R


@dataclass(frozen=True, slots=True)
class Cost:
    """Signal to quantization noise of one projection in dB: own scales, and shared ones."""

    own_db: float
    shared_db: float

    @property
    def lost_db(self) -> float:
        return self.own_db - self.shared_db


def cost(
    w_RC: Tensor,
    heads: Heads,
    round_trip: Callable[[Tensor, Tensor], Tensor],
    sharing: Sharing = Sharing.CYCLE,
) -> Cost:
    """What permutation-proof scales cost on one weight.

    `round_trip(w_RC, amax_R1)` quantizes with scales made from `amax_R1` and dequantizes again.
    """
    amax_R1 = w_RC.abs().amax(1, keepdim=True)
    own_RC = round_trip(w_RC, amax_R1)
    shared_RC = round_trip(w_RC, share_amax(amax_R1, heads, sharing))
    return Cost(own_db=_snr_db(w_RC, own_RC), shared_db=_snr_db(w_RC, shared_RC))


def _snr_db(want: Tensor, got: Tensor) -> float:
    """Signal over noise in dB; infinite if nothing was lost."""
    noise = (want.double() - got.double()).square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * (want.double().square().sum() / noise).log10())
