"""Permutation-proof scales: q/k scales that no engine can spoil by forgetting to permute them.

Engines that permute q/k rows while loading do not all permute the scales (vLLM before PR 34243,
SGLang). If all rows that the permutation exchanges have one scale, permuted and unpermuted scales
are the same bytes, and such an engine is right too. Rows of small values then get a coarser step
than they need; `convert.proof_cost` says how much is lost.

Shape letters: R rows, N one or more columns of statistics, S sets of rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ckptq.permute.order import Heads, Sharing, cycles


def share_amax(amax_RN: Tensor, heads: Heads, sharing: Sharing = Sharing.CYCLE) -> Tensor:
    """Raise each row's statistic to the largest of the rows it shares a scale with; same shape.

    The rows are those of whole heads: all of the projection's, or of some that follow each other.
    Give it max |w| by row [R, 1], or by row and group [R, G]; for an asymmetric format give it
    the maximum, and minus the minimum. Only copies values, so it is exact in any dtype, and a
    scale computed from the result in the usual way is proof.
    """
    count = len(amax_RN) // heads.head_dim
    set_R = _shared_sets(replace(heads, count=count), sharing).to(amax_RN.device)
    index_RN = set_R[:, None].expand_as(amax_RN)
    largest_SN = torch.full_like(amax_RN[: int(set_R.max()) + 1], -torch.inf)
    return largest_SN.scatter_reduce(0, index_RN, amax_RN, "amax")[set_R]


@lru_cache(maxsize=64)
def _shared_sets(heads: Heads, sharing: Sharing) -> Tensor:
    """For each row the number of its set, [R]."""
    set_R = torch.arange(heads.rows) // heads.head_dim
    if sharing is Sharing.CYCLE:
        for number, rows in enumerate(cycles(heads)):
            set_R[rows] = number
    return set_R
