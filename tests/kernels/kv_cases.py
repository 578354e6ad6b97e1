"""Sequences, slots and heads that the KV-cache tests share."""

import torch
from torch import Tensor

from ckptq.kernels.cache.paging import Sequences

BLOCK = 8
BLOCKS = 11
LENGTHS = (37, 9)
QUERIES = (5, 1)
TABLE = ((3, 0, 6, 2, 9), (5, 1, 0, 0, 0))


def sequences(device: torch.device) -> Sequences:
    """A prefill of 5 queries at the end of 37 keys, and a decode step over 9."""

    def int32(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Sequences(
        query_starts=int32([0, 5, 6]),
        lengths=int32(LENGTHS),
        block_table=int32(TABLE),
        longest=max(QUERIES),
    )


def slots() -> Tensor:
    """The slot of every key of both sequences, in order."""
    found = [
        TABLE[n][i // BLOCK] * BLOCK + i % BLOCK
        for n, length in enumerate(LENGTHS)
        for i in range(length)
    ]
    return torch.tensor(found)


def heads(
    tokens: int, heads: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """[tokens, heads, D]: a mean that is not zero, a size per head, an outlier channel, a zero."""
    generator = torch.Generator().manual_seed(seed)
    x_THD = torch.randn(tokens, heads, D, generator=generator) + 0.3
    x_THD *= torch.rand(heads, 1, generator=generator) + 0.5
    x_THD[:, :, 3] *= 8
    x_THD[tokens // 2, 0] = 0.0
    return x_THD.to(dtype)


def per_sequence(x_TKD: Tensor) -> list[Tensor]:
    return list(x_TKD.split(LENGTHS))
