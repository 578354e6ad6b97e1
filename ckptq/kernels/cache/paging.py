"""A paged KV cache: fixed-size blocks of tokens, found through a table per sequence.

Caches are [blocks, tokens, heads, ...], with any strides. A slot is a block times the tokens of a
block, plus the token in it.

Shape letters: N sequences of a batch, L columns of the block table, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ckptq.kernels.gpu import MOST_HEADS


def check_slots(slot_T: Tensor, tokens: int, cache: Tensor) -> None:
    """Raise ValueError unless the slots are whole numbers beside the cache, of `tokens` at most."""
    if slot_T.dtype not in (torch.int32, torch.int64) or slot_T.device != cache.device:
        found = f"{slot_T.dtype} on {slot_T.device}"
        raise ValueError(f"slots are {found}, want int32 or int64 on {cache.device}")
    if slot_T.ndim != 1 or len(slot_T) > tokens:
        raise ValueError(f"slots {list(slot_T.shape)} for {tokens} tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Which queries belong to which sequence, and where its keys are. All int32, on the device."""

    query_starts: Tensor
    """[N + 1]: first query of each sequence among all queries; the last entry is their number."""
    lengths: Tensor
    """[N]: keys of each sequence; its queries stand at the last of them."""
    block_table: Tensor
    """[N, L]: the cache blocks of each sequence, in order."""
    longest: int
    """The most queries that a sequence has."""

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """As kernels take them, the last is from a row of the table to the next."""
        return self.query_starts, self.lengths, self.block_table, self.block_table.stride(0)

    def check(self, cache: Tensor, kv_heads: int) -> None:
        """Raise ValueError unless all are int32, fit each other and a launch, beside the cache."""
        for name in ("query_starts", "lengths", "block_table"):
            x = getattr(self, name)
            if x.dtype != torch.int32 or x.device != cache.device or x.stride(-1) != 1:
                found = f"{x.dtype} on {x.device}"
                raise ValueError(f"{name} is {found}, want dense int32 on {cache.device}")
        N = len(self.lengths)
        if N * kv_heads > MOST_HEADS:
            raise ValueError(f"{N} sequences of {kv_heads} key/value heads: at most {MOST_HEADS}")
        if self.query_starts.shape != (N + 1,) or self.block_table.shape[0] != N:
            shapes = [list(x.shape) for x in (self.query_starts, self.lengths, self.block_table)]
            raise ValueError(f"query starts, lengths, block table do not fit each other: {shapes}")
