"""Attention at head sizes and in combinations that models have, and what it refuses."""

import pytest
import reference_attention as meaning
import reference_cache as paged
import torch
from kv_cases import BLOCK, BLOCKS, heads, per_sequence, sequences, slots
from test_attention import SMALL, error, qkv, to

from ckptq.kernels.attention.attention_tile import default_tile
from ckptq.kernels.attention.dense_attention import attention
from ckptq.kernels.attention.mask import Mask, seen
from ckptq.kernels.cache.paged_attention import paged_attention
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.cache.write_cache import write_cache
from ckptq.kernels.token_head.token_head_attention import token_head_attention

FP8 = torch.float8_e4m3fn
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [72, 112, 192, 256])
def test_head_sizes_with_the_default_tile(device: torch.device, D: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(37, D, dtype, 3, 1)
    got = attention(*to(device, q, k, v), scaling=D**-0.5)
    want = meaning.attention(q, k, v, seen(Mask(), 37, 37), scaling=D**-0.5)
    assert error(got, want) < ROUNDING[dtype]


@pytest.mark.parametrize(("H", "K"), [(1, 1), (6, 2), (5, 1), (16, 1)])
def test_groups_of_query_heads(device: torch.device, H: int, K: int) -> None:
    """And the twin: heads dealt out in turn instead of in runs."""
    q, k, v = qkv(33, 64, torch.float32, H, K)
    got = attention(*to(device, q, k, v), scaling=0.1, tile=SMALL)
    seen_1SS = seen(Mask(), 33, 33)
    assert error(got, meaning.attention(q, k, v, seen_1SS, scaling=0.1)) < 1e-6
    if K > 1:
        turns = (x.repeat(1, H // K, 1, 1) for x in (k, v))
        assert error(got, meaning.attention(q, *turns, seen_1SS, scaling=0.1)) > 0.1


def test_queries_before_the_first_key_see_nothing(device: torch.device) -> None:
    q, k, v = qkv(12, 64)
    got = attention(*to(device, q, k[:, :, :5], v[:, :, :5]), scaling=0.1, tile=SMALL)
    assert not got[:, :7].any()
    want = meaning.attention(q, k[:, :, :5], v[:, :, :5], seen(Mask(), 12, 5), scaling=0.1)
    assert error(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("D", "H", "K"), [(64, 2, 2), (112, 6, 2), (256, 16, 1), (64, 71, 1)])
def test_paged_in_sixteen_bits(
    device: torch.device, D: int, H: int, K: int, dtype: torch.dtype
) -> None:
    q, k, v = heads(6, H, D, dtype, 2), heads(46, K, D, dtype), heads(46, K, D, dtype, 1)
    caches = [torch.zeros(BLOCKS, BLOCK, K, D, dtype=dtype, device=device) for _ in "kv"]
    write_cache(k.to(device), v.to(device), *caches, slots().to(device))
    got = paged_attention(q.to(device), *caches, sequences(device), scaling=D**-0.5)
    cpu = sequences(torch.device("cpu"))
    want = paged.attention(q, per_sequence(k), per_sequence(v), cpu, scaling=D**-0.5)
    assert got.dtype == dtype
    assert error(got, want) < ROUNDING[dtype]


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan")])
def test_a_cap_of_nothing_is_refused(device: torch.device, softcap: float) -> None:
    """It would divide by zero; no cap is None."""
    q, k, v = to(device, *qkv(7, 64))
    with pytest.raises(ValueError, match="a soft cap is positive"):
        attention(q, k, v, scaling=0.1, softcap=softcap)
    cache = torch.zeros(BLOCKS, BLOCK, 1, 64, device=device)
    run, q_THD = {"scaling": 0.1, "softcap": softcap}, q[0].transpose(0, 1)[:6]
    with pytest.raises(ValueError, match="a soft cap is positive"):
        paged_attention(q_THD, cache, cache, sequences(device), **run)


def test_spans_that_do_not_fit_are_refused(device: torch.device) -> None:
    """The kernel would read whatever lies there."""
    q, k, v = to(device, *qkv(7, 16, B=2))
    good = torch.zeros(2, dtype=torch.int32, device=device)
    for wrong in (good.long(), good[:1], good[:, None], torch.stack([good, good], 1)[:, 0]):
        with pytest.raises(ValueError, match="of spans"):
            attention(q, k, v, scaling=0.1, spans=(good, wrong))


def test_more_heads_than_a_launch_takes_are_refused(device: torch.device) -> None:
    x = torch.zeros(1, 1, 1, 1, device=device)
    many = x.expand(2048, 32, 1, 16)
    with pytest.raises(ValueError, match="2048 sequences of 32 heads"):
        attention(many, many, many, scaling=1.0)
    counts = torch.zeros(32769, dtype=torch.int32, device=device)
    batch = Sequences(
        query_starts=counts, lengths=counts[:-1], block_table=counts[:-1, None], longest=1
    )
    with pytest.raises(ValueError, match="at most 65535"):
        batch.check(x, 2)
    batch.check(x, 1)


def test_caches_that_are_no_pair_are_refused(device: torch.device) -> None:
    q = heads(6, 4, 64).to(device)
    cache = torch.zeros(BLOCKS, BLOCK, 2, 64, device=device)
    run = {"scaling": 0.1}
    for key, value, message in (
        (cache, cache[:9], "no pair"),
        (cache, cache.half(), "no pair"),
        (cache.to(FP8), cache, "no pair"),
        (cache, cache.transpose(1, 2).contiguous().transpose(1, 2), "laid out alike"),
        (*[cache.mT.contiguous().mT] * 2, "heads dense"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(q, key, value, sequences(device), **run)


def test_tiles_shrink_where_a_program_has_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A10 or L4 (99 KiB), an A100 (163), an H200 (227); each tile's operands fit."""
    from ckptq.kernels.attention import attention_tile

    gpu = torch.device("cuda", 0)
    for kib in (99, 163, 227):
        monkeypatch.setattr(attention_tile, "shared_memory", lambda _, kib=kib: kib << 10)
        for D in (64, 128, 256):
            tile = default_tile(D, torch.bfloat16, gpu)
            held = 2 * D * (tile.rows + 2 * tile.stages * tile.columns)
            assert held <= kib << 10, (kib, D, tile)


def test_token_head_caches_of_other_heads_are_refused(device: torch.device) -> None:
    from ckptq.kernels.token_head.kv_format import INT4, INT8
    from ckptq.kernels.token_head.token_head_cache import TokenHeadCache

    q = heads(6, 4, 64).to(device)
    held = TokenHeadCache.empty(INT8, BLOCKS, BLOCK, 2, 64, device=device)
    for fmt, K, D, message in (
        (INT8, 3, 64, "over a cache of 3 heads"),
        (INT8, 2, 96, "over a cache of 2 heads of 96"),
        (INT4, 2, 64, "differ in format"),
    ):
        other = TokenHeadCache.empty(fmt, BLOCKS, BLOCK, K, D, device=device)
        with pytest.raises(ValueError, match=message):
            token_head_attention(q, other, held, sequences(device), scaling=0.1)
