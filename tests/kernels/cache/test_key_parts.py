"""A decode step whose keys several programs divide: the result of one program, and of float64."""

import pytest
import reference_cache
import torch
from kv_cases import BLOCK, heads
from torch import Tensor

from ckptq.kernels.attention.mask import Mask
from ckptq.kernels.cache import key_parts
from ckptq.kernels.cache.paged_attention import paged_attention
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.token_head.kv_format import INT2, INT8, KVFormat
from ckptq.kernels.token_head.token_head_attention import token_head_attention
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache
from ckptq.kernels.token_head.write_token_head import write_token_head

LENGTHS = (400, 0, 1)
"""Four parts with keys; none at all; one key, so that three parts are empty."""
D, K, H = 64, 2, 6
MASKS = [Mask(), Mask(sliding_window=200), Mask(chunk=128)]


def sequences(device: torch.device) -> Sequences:
    blocks = -(-max(LENGTHS) // BLOCK)
    table = torch.arange(len(LENGTHS) * blocks, dtype=torch.int32, device=device)
    return Sequences(
        query_starts=torch.arange(len(LENGTHS) + 1, dtype=torch.int32, device=device),
        lengths=torch.tensor(LENGTHS, dtype=torch.int32, device=device),
        block_table=table.view(len(LENGTHS), blocks),
        longest=1,
    )


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_parts, "MOST", 1)


def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_parts, "MOST", 4)
    monkeypatch.setattr(key_parts, "LEAST", 64)
    assert key_parts.parts_of(len(LENGTHS) * K, max(LENGTHS), torch.device("cpu")) == 4


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_parts_of_a_plain_cache_make_the_whole(
    mask: Mask, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sequences(device)
    blocks = found.block_table.numel()
    shape = (blocks, BLOCK, K, D)
    flat = [heads(blocks * BLOCK, K, D, seed=i) for i in range(2)]
    k, v = (x.to(device).view(shape) for x in flat)
    q = heads(len(LENGTHS), H, D, seed=2).to(device)
    tokens = found.block_table.shape[1] * BLOCK
    held = [[x[n * tokens :][:length] for n, length in enumerate(LENGTHS)] for x in flat]
    want = reference_cache.attention(q.cpu(), *held, found, scaling=0.1, mask=mask)
    alone(monkeypatch)
    one = paged_attention(q, k, v, found, scaling=0.1, mask=mask)
    divided(monkeypatch)
    several = paged_attention(q, k, v, found, scaling=0.1, mask=mask)
    torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(several.cpu(), want.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(several[1], torch.zeros_like(several[1]))


@pytest.mark.parametrize("fmt", [INT8, INT2], ids=lambda fmt: fmt.name)
def test_parts_of_codes_make_the_whole(
    fmt: KVFormat, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sequences(device)
    blocks = found.block_table.numel()
    held = [TokenHeadCache.empty(fmt, blocks, BLOCK, K, D, device=device) for _ in "kv"]
    for i, cache in enumerate(held):
        x = heads(blocks * BLOCK, K, D, seed=i).to(device)
        write_token_head(x, cache, torch.arange(blocks * BLOCK, device=device))
    q = heads(len(LENGTHS), H, D, seed=2).to(device)
    alone(monkeypatch)
    one = token_head_attention(q, *held, found, scaling=0.1)
    divided(monkeypatch)
    several = token_head_attention(q, *held, found, scaling=0.1)
    torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5)


def test_a_wrong_sum_of_one_part_is_noticed(device: torch.device) -> None:
    """The twin: the merged result depends on every part's sum and maximum."""
    partial = key_parts.Partial.of(3, D, 4, device)
    made: list[Tensor] = []
    for spoiled in (False, True):
        torch.manual_seed(0)
        for x in (partial.out, partial.max, partial.sum):
            x.copy_(torch.rand(x.shape))
        if spoiled:
            partial.sum[2, 1] *= 2
        made.append(torch.empty(3, D, device=device))
        partial.merge(made[-1])
    assert [torch.equal(a, b) for a, b in zip(*made, strict=True)] == [True, False, True]
