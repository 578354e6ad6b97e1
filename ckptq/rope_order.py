"""The two orders in which q/k rows are stored, and the permutation between them. Imports no torch.

A rotary embedding turns pairs of a head's dimensions. Interleaved RoPE (Meta's and HF's Llama-4)
pairs neighbours, (0, 1), (2, 3), ...; half-split RoPE (NeoX style, all that fast kernels do) pairs
dimension i with i + rotary_dim / 2. Reordering the output rows of q_proj and k_proj alike turns
one into the other and leaves every q.k product as it was.

Formula: vLLM 0.32, `Llama4ForCausalLM.permute_qk_weight_for_rotary`, which is
`w.view(H, D // 2, 2, C).transpose(1, 2)`: per head first the even rows, then the odd ones. Where
`rotary_dim < head_dim` the rotated rows come first in each head (as in transformers' and vLLM's
partial rotary embeddings) and the others stay.

Layers without RoPE (Llama-4's NoPE layers) may be in either order, as q.k does not change. vLLM
and SGLang permute them like all others, so code that simulates those engines must too;
transformers never permutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ckptq.errors import PlanError


class RopeOrder(StrEnum):
    """How the rows of a head are ordered on disk."""

    INTERLEAVED = "interleaved"
    HALF_SPLIT = "half-split"

    @property
    def other(self) -> RopeOrder:
        return RopeOrder.HALF_SPLIT if self is RopeOrder.INTERLEAVED else RopeOrder.INTERLEAVED


@dataclass(frozen=True, slots=True)
class Heads:
    """Geometry of the output rows of one projection: `count` heads of `head_dim` rows.

    `count` is num_attention_heads for q_proj and num_key_value_heads for k_proj.
    Example: `Heads(40, 128)` is q_proj of Llama-4 Scout, 5120 rows, all of them rotated.
    """

    count: int
    head_dim: int
    rotary_dim: int = 0
    """How many leading rows of each head are rotated; 0 means all."""

    def __post_init__(self) -> None:
        if self.rotary_dim == 0:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if self.count < 1 or self.head_dim < 2:
            raise PlanError(f"impossible attention: {self.count} heads of {self.head_dim} rows")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise PlanError(
                f"rotary dimension {self.rotary_dim} of head dimension {self.head_dim}: "
                "expected an even number from 2 to the head dimension"
            )

    @property
    def rows(self) -> int:
        return self.count * self.head_dim

    @property
    def one(self) -> Heads:
        """The geometry of a tensor that all heads share."""
        return Heads(1, self.head_dim, self.rotary_dim)


def gather_indices(heads: Heads, to: RopeOrder) -> list[int]:
    """For each output row the input row it comes from: `out[r] = in[gather_indices[r]]`.

    `to` names the order of the result; the input is in the other one.
    Example: one head of 6 rows, to half-split: [0, 2, 4, 1, 3, 5].
    """
    within = _gather_within_head(heads.rotary_dim, to)
    within += range(heads.rotary_dim, heads.head_dim)
    return [head * heads.head_dim + row for head in range(heads.count) for row in within]


def _gather_within_head(rotary_dim: int, to: RopeOrder) -> list[int]:
    if to is RopeOrder.HALF_SPLIT:
        return [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2)]
    half = rotary_dim // 2
    return [row // 2 + half * (row % 2) for row in range(rotary_dim)]


def keeps_blocks(heads: Heads, block_rows: int) -> bool:
    """Whether every row stays in its block of `block_rows` rows, so that block scales remain valid.

    So it is when blocks hold whole heads: 128 rows with head_dim 64 or 128, not with 256.
    """
    gather = gather_indices(heads, RopeOrder.HALF_SPLIT)
    return all(row // block_rows == came // block_rows for row, came in enumerate(gather))
