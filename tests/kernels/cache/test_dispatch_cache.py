"""The doors of caches: one per kernel, and both sides of each give the same."""

import pytest
import torch
from doors import CACHES, doors, take
from kernel_cases import same
from kv_cases import BLOCK, BLOCKS, heads, sequences, slots
from torch import Tensor

from ckptq.kernels.attention.mask import Mask
from ckptq.kernels.cache import dispatch as paged
from ckptq.kernels.token_head import dispatch as token_head
from ckptq.kernels.token_head.kv_format import FORMATS, KVFormat
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache

FP8 = torch.float8_e4m3fn
LOCAL = {"scaling": 0.1, "mask": Mask(sliding_window=11), "softcap": 20.0}


def test_the_doors_are_those_of_the_kernels() -> None:
    kernels = {"write_cache", "paged_attention", "write_token_head", "token_head_attention"}
    assert doors(CACHES).keys() == kernels


def sides(monkeypatch: pytest.MonkeyPatch, device: torch.device):
    """Torch on the CPU, then the kernel: without a GPU by saying that there is one."""
    for gpu in (False, True):
        take(monkeypatch, gpu)
        yield device if gpu else torch.device("cpu")


def error(got: Tensor, want: Tensor) -> float:
    return ((got.cpu().double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=["fp32", "fp8"])
def test_static_caches(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    q, k, v = heads(6, 6, 64, seed=2), heads(46, 2, 64), heads(46, 2, 64, seed=1)
    scale = torch.tensor([0.02, 0.03]) if dtype == FP8 else None
    slot_T, made = slots(), []
    slot_T[7] = -1
    for where in sides(monkeypatch, device):
        on = None if scale is None else scale.to(where)
        pair = [torch.zeros(BLOCKS, BLOCK, 2, 64, device=where) for _ in "kv"]
        caches = [cache.to(dtype) for cache in pair]
        paged.write_cache(
            *(k.to(where), v.to(where), *caches, slot_T[:40].to(where)),
            k_scale=on,
            v_scale=on,
        )
        descales = None if on is None else (torch.ones(1, device=where), on, on)
        run = {"descales": descales, **LOCAL}
        out = paged.paged_attention(q.to(where), *caches, sequences(where), **run)
        made.append((*caches, out))
    (key, value, want), got = made
    assert same(got[0], key)
    assert same(got[1], value)
    assert key.float().any()
    assert got[2].dtype == want.dtype == q.dtype
    assert error(got[2], want) < 1e-6


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda f: f.name)
def test_caches_with_a_scale_per_token_and_head(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, fmt: KVFormat
) -> None:
    q, k, v = heads(6, 4, 96, seed=2), heads(46, 2, 96), heads(46, 2, 96, seed=1)
    slot_T, made = slots(), []
    slot_T[7] = -1
    for where in sides(monkeypatch, device):
        caches = []
        for x in (k, v):
            caches.append(TokenHeadCache.empty(fmt, BLOCKS, BLOCK, 2, 96, device=where))
            token_head.write_token_head(x.to(where), caches[-1], slot_T[:40].to(where))
        out = token_head.token_head_attention(q.to(where), *caches, sequences(where), **LOCAL)
        made.append((*caches, out))
    *cpu, want = made[0]
    *gpu, got = made[1]
    for one, other in zip(cpu, gpu, strict=True):
        assert same(other.code, one.code)
        assert same(other.scale, one.scale)
        assert one.zero is None or same(other.zero, one.zero)
    assert error(got, want) < 2e-6


def test_an_fp8_query_comes_out_in_the_dtype_that_is_asked_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, outs = heads(6, 4, 64, seed=2).to(FP8), []
    held = heads(BLOCKS * BLOCK, 2, 64).view(BLOCKS, BLOCK, 2, 64).to(FP8)
    for where in sides(monkeypatch, device):
        descales = [torch.tensor(d, device=where) for d in ([0.5, 1.0, 0.25, 2.0], [0.5], [0.25])]
        run = {"scaling": 0.1, "descales": descales, "dtype": torch.float16}
        cache = held.to(where)
        outs.append(paged.paged_attention(q.to(where), cache, cache, sequences(where), **run))
    assert outs[0].dtype == outs[1].dtype == torch.float16
    assert error(outs[1], outs[0]) < 2e-3
