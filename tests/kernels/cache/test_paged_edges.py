"""Attention over paged caches at the edges of a batch: nothing but keys that are seen is read.

Every block that holds no key is NaN, and so are entries of the block table that no key needs: those
past a sequence's end are -1, those that a window has left behind the null block 0, as in vLLM.
"""

import pytest
import reference_cache as paged
import torch
from kv_cases import BLOCK, heads
from torch import Tensor

from ckptq.kernels.attention.mask import Mask, seen
from ckptq.kernels.cache.paged_attention import paged_attention
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.cache.write_cache import write_cache
from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.kv_format import FORMATS, KVFormat
from ckptq.kernels.token_head.token_head_attention import token_head_attention
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache
from ckptq.kernels.token_head.write_token_head import write_token_head

FP8 = torch.float8_e4m3fn
LENGTHS = (1, 0, 0, 38, 8, 2)
"""A first token; nothing; a query that pads a batch; a long past; a full block; two tokens."""
QUERIES = (1, 0, 1, 4, 8, 3)
"""The last sequence has a query more than keys: it sees nothing."""
WIDTH, BLOCKS = 5, 12
MASKS = [Mask(), Mask(sliding_window=9), Mask(sliding_window=1000), Mask(chunk=8)]
D, K, H = 64, 2, 6


def oldest(mask: Mask, length: int, queries: int) -> int:
    """The first key that any query of a sequence sees."""
    seen_S = seen(mask, queries, length)[0, 0].any(0)
    return int(seen_S.int().argmax()) if seen_S.any() else length


def batch(mask: Mask, device: torch.device) -> tuple[Sequences, Tensor]:
    """Sequences whose blocks lie in no order, and the slots of all their keys, -1 where freed."""
    free, table, slots = iter((7, 3, 9, 1, 5, 11, 2, 8, 4)), [], []
    for length, queries in zip(LENGTHS, QUERIES, strict=True):
        first, used = oldest(mask, length, queries) // BLOCK, -(-length // BLOCK)
        row = [0 if i < first else next(free) for i in range(used)]
        table.append(row + [-1] * (WIDTH - used))
        slots += [
            row[i // BLOCK] * BLOCK + i % BLOCK if row[i // BLOCK] else -1 for i in range(length)
        ]
    starts = [0, *torch.tensor(QUERIES).cumsum(0).tolist()]

    def int32(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    sequences = Sequences(
        query_starts=int32(starts),
        lengths=int32(LENGTHS),
        block_table=int32(table),
        longest=max(QUERIES),
    )
    return sequences, torch.tensor(slots)


def nowhere(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cache of NaN behind a block of NaN, which is its block -1."""
    whole = torch.empty((shape[0] + 1, *shape[1:]), dtype=dtype, device=device)
    (whole.view(torch.uint8) if dtype.itemsize == 1 else whole).fill_(
        0x7F if dtype.itemsize == 1 else float("nan")
    )
    return whole[1:]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.cpu().double() - want.double()).norm() / want.double().norm()).item()


def per_sequence(x_TKD: Tensor) -> list[Tensor]:
    return list(x_TKD.split(LENGTHS))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=["fp32", "fp8"])
def test_static_caches(device: torch.device, dtype: torch.dtype, mask: Mask) -> None:
    sequences, slots = batch(mask, device)
    q, k, v = heads(sum(QUERIES), H, D, seed=2), *(heads(49, K, D, seed=n) for n in (0, 1))
    scale = torch.full((1,), 0.25) if dtype == FP8 else None
    on_device = None if scale is None else scale.to(device)
    caches = [nowhere((BLOCKS, BLOCK, K, D), dtype, device) for _ in "kv"]
    write_cache(
        *(k.to(device), v.to(device), *caches, slots.to(device)),
        k_scale=on_device,
        v_scale=on_device,
    )
    got = paged_attention(
        *(q.to(device), *caches, sequences),
        scaling=0.1,
        mask=mask,
        descales=None
        if on_device is None
        else (torch.ones(1, device=device), on_device, on_device),
    )
    if scale is not None:
        k, v = ((x / scale).to(FP8).float() * scale for x in (k, v))
    want = paged.attention(
        *(q, per_sequence(k), per_sequence(v), batch(mask, torch.device("cpu"))[0]),
        scaling=0.1,
        mask=mask,
    )
    assert not want[1].any()
    assert not got[[1, 14]].any()  # what pads the batch, and the query before its first key
    assert error(got, want) < 1e-6


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda f: f.name)
def test_caches_with_a_scale_per_token_and_head(
    device: torch.device, fmt: KVFormat, mask: Mask
) -> None:
    sequences, slots = batch(mask, device)
    q, k, v = heads(sum(QUERIES), H, D, seed=2), *(heads(49, K, D, seed=n) for n in (0, 1))
    caches = []
    for x in (k, v):
        cache = TokenHeadCache.empty(fmt, BLOCKS, BLOCK, K, D, device=device)
        parts = {f: getattr(cache, f) for f in cache.__slots__}
        parts["scale"] = nowhere((BLOCKS, BLOCK, K), torch.float32, device)
        cache = TokenHeadCache(**parts)
        write_token_head(x.to(device), cache, slots.to(device))
        caches.append(cache)
    got = token_head_attention(q.to(device), *caches, sequences, scaling=0.1, mask=mask)
    held = [per_sequence(kv.dequantize(kv.quantize(x, fmt), fmt)) for x in (k, v)]
    cpu = batch(mask, torch.device("cpu"))[0]
    assert not got[[1, 14]].any()
    assert error(got, paged.attention(q, *held, cpu, scaling=0.1, mask=mask)) < 2e-6


def test_a_block_that_a_window_still_reaches_is_needed(device: torch.device) -> None:
    """The twin: with a window of one block more, NaN of what was freed comes out."""
    freed, wider = Mask(sliding_window=9), Mask(sliding_window=20)
    sequences, slots = batch(freed, device)
    x = heads(49, K, D)
    caches = [nowhere((BLOCKS, BLOCK, K, D), x.dtype, device) for _ in "kv"]
    write_cache(x.to(device), x.to(device), *caches, slots.to(device))
    q = heads(sum(QUERIES), H, D, seed=2).to(device)
    run = {"scaling": 0.1, "mask": wider}
    got = paged_attention(q, *caches, sequences, **run)
    assert got[2:6].isnan().any()
    assert not got[6:].isnan().any()
