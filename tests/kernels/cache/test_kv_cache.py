"""Writing static caches, and attention over them: strides, scales, skipped slots, block tables."""

import pytest
import reference_cache as meaning
import torch
from kernel_cases import same
from kv_cases import BLOCK, BLOCKS, heads, per_sequence, sequences, slots
from torch import Tensor

from ckptq.kernels.attention.mask import Mask
from ckptq.kernels.cache.paged_attention import paged_attention
from ckptq.kernels.cache.write_cache import write_cache

FP8 = torch.float8_e4m3fn
ORDERS = pytest.mark.parametrize("heads_first", [False, True], ids=["NHD", "HND"])


def scales(x_TKD: Tensor, per_head: bool, dtype: torch.dtype) -> Tensor:
    amax_K = x_TKD.float().abs().amax((0, 2))
    return ((amax_K if per_head else amax_K.amax()[None]) / 448).to(dtype)


def laid_out(cache: Tensor, heads_first: bool) -> Tensor:
    """As engines lay blocks out: tokens, or heads, first. Kernels go by strides."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2) if heads_first else cache


def error(got: Tensor, want: Tensor) -> float:
    return ((got.cpu().double() - want).norm() / want.norm()).item()


@ORDERS
@pytest.mark.parametrize("held", ["plain", "per-tensor", "per-head", "per-head-bf16"])
@pytest.mark.parametrize("D", [64, 80])
def test_write(device: torch.device, heads_first: bool, held: str, D: int) -> None:
    k, v = heads(46, 3, D, torch.bfloat16), heads(46, 3, D, torch.bfloat16, seed=1)
    slot_T = slots()
    slot_T[[0, 7, 45]] = -1
    scale_dtype = torch.bfloat16 if held.endswith("bf16") else torch.float32
    pair = [None, None]
    if held != "plain":
        pair = [scales(x, "head" in held, scale_dtype) for x in (k, v)]
        pair[0] = pair[0] / 2  # too small on purpose: the largest values saturate
    dtype = torch.bfloat16 if held == "plain" else FP8
    caches = []
    for x, scale in zip((k, v), pair, strict=True):
        cache = torch.full((BLOCKS, BLOCK, 3, D), 0.5).to(dtype)
        meaning.write(x, cache, slot_T, scale)
        caches.append(cache)
    got = [laid_out(torch.full((BLOCKS, BLOCK, 3, D), 0.5).to(dtype).to(device), heads_first)]
    got.append(got[0].clone())
    on_device = [None if s is None else s.view(-1, 1, 1).to(device) for s in pair]
    write_cache(
        *(k.to(device), v.to(device), *got, slot_T.to(device)),
        k_scale=on_device[0],
        v_scale=on_device[1],
    )
    assert same(got[0], caches[0])
    assert same(got[1], caches[1])


def test_scales_are_read_by_their_own_strides(device: torch.device) -> None:
    """One for all heads, expanded; one a head, apart."""
    k, v, slot_T = heads(46, 3, 64).to(device), heads(46, 3, 64, seed=1).to(device), slots()
    apart = torch.tensor([0.02, 9.0, 0.03, 9.0, 0.04, 9.0], device=device)[::2]

    def written(scale: Tensor) -> Tensor:
        caches = [torch.zeros(BLOCKS, BLOCK, 3, 64, dtype=FP8, device=device) for _ in "kv"]
        write_cache(k, v, *caches, slot_T.to(device), k_scale=scale, v_scale=scale)
        return torch.stack([cache.view(torch.uint8) for cache in caches])

    one = torch.tensor([0.05], device=device)
    assert torch.equal(written(one.expand(3)), written(one))
    assert torch.equal(written(apart), written(apart.contiguous()))
    assert not torch.equal(written(apart), written(one))


def test_another_heads_scale_is_noticed(device: torch.device) -> None:
    x = heads(46, 3, 64, torch.bfloat16)
    scale = scales(x, True, torch.float32).to(device)
    written = []
    for s in (scale, scale.roll(1)):
        cache = torch.zeros(BLOCKS, BLOCK, 3, 64, dtype=FP8, device=device)
        write_cache(
            *(x.to(device), x.to(device), cache, cache.clone(), slots().to(device)),
            k_scale=s,
            v_scale=s,
        )
        written.append(cache)
    assert not same(written[0], written[1].cpu())


@ORDERS
@pytest.mark.parametrize(
    ("D", "mask", "softcap"),
    [
        (64, Mask(), None),
        (80, Mask(sliding_window=11), None),
        (96, Mask(chunk=16), 20.0),
        (128, Mask(), None),
    ],
    ids=str,
)
def test_attention(
    device: torch.device, heads_first: bool, D: int, mask: Mask, softcap: float | None
) -> None:
    q, k, v = heads(6, 6, D, seed=2), heads(46, 2, D), heads(46, 2, D, seed=1)
    caches = [laid_out(torch.zeros(BLOCKS, BLOCK, 2, D, device=device), heads_first) for _ in "kv"]
    write_cache(k.to(device), v.to(device), *caches, slots().to(device))
    run = {"scaling": D**-0.5, "mask": mask, "softcap": softcap}
    got = paged_attention(q.to(device), *caches, sequences(device), **run)
    want = meaning.attention(
        q, per_sequence(k), per_sequence(v), sequences(torch.device("cpu")), **run
    )
    assert error(got, want) < 1e-6


@pytest.mark.parametrize("per_head", [True, False], ids=["per-head", "per-tensor"])
@pytest.mark.parametrize("query", ["bf16", "fp8"])
def test_attention_over_fp8(device: torch.device, per_head: bool, query: str) -> None:
    D = 64
    q, k, v = heads(6, 4, D, torch.bfloat16, 2), heads(46, 2, D), heads(46, 2, D, seed=1)
    k[:, 1] *= 5
    v[:, 1] *= 5
    k_scale, v_scale = scales(k, per_head, torch.float32), scales(v, per_head, torch.float32)
    q_scale = torch.ones(1)
    if query == "fp8":
        q_scale = scales(q, per_head, torch.float32)
        q = (q.float() / q_scale.view(-1, 1)).to(FP8)
    codes = [(k / k_scale.view(-1, 1)).to(FP8), (v / v_scale.view(-1, 1)).to(FP8)]
    caches = [torch.zeros(BLOCKS, BLOCK, 2, D, dtype=FP8) for _ in "kv"]
    for x, cache in zip(codes, caches, strict=True):
        cache.view(-1, 2, D)[slots()] = x
    value = [
        x.double() * s.view(-1, 1)
        for x, s in zip((q, *codes), (q_scale, k_scale, v_scale), strict=True)
    ]
    cpu = sequences(torch.device("cpu"))
    want = meaning.attention(
        *(value[0], per_sequence(value[1]), per_sequence(value[2]), cpu),
        scaling=0.1,
        e4m3_weights=query == "fp8",
    )

    def run(*descales: Tensor) -> Tensor:
        return paged_attention(
            q.to(device),
            *(cache.to(device) for cache in caches),
            sequences(device),
            scaling=0.1,
            descales=tuple(d.to(device) for d in descales),
        )

    got = run(q_scale, k_scale, v_scale)
    assert error(got, want) < 3e-3
    if query == "fp8":
        held = value[0], per_sequence(value[1]), per_sequence(value[2])
        exact = meaning.attention(*held, cpu, scaling=0.1)
        assert error(got, want) < 0.75 * error(got, exact)  # where no weight is rounded
    if per_head:
        assert error(run(q_scale, k_scale.flip(0), v_scale), want) > 0.05
        assert error(run(q_scale, k_scale, v_scale.flip(0)), want) > 0.5


def test_an_fp8_query_comes_out_in_the_dtype_that_is_asked_for(device: torch.device) -> None:
    q, descales = heads(6, 4, 64, FP8, 2), ([0.5, 1.0, 0.25, 2.0], [0.5], [0.25])
    cache = heads(BLOCKS * BLOCK, 2, 64, FP8).view(BLOCKS, BLOCK, 2, 64)
    held = per_sequence(cache.double().flatten(0, 1)[slots()])
    got = paged_attention(
        *(q.to(device), cache.to(device), cache.to(device), sequences(device)),
        scaling=0.1,
        descales=tuple(torch.tensor(d, device=device) for d in descales),
        dtype=torch.float16,
    )
    query, keys = q.double() * torch.tensor(descales[0])[:, None], [x * 0.5 for x in held]
    want = meaning.attention(
        *(query, keys, [x * 0.25 for x in held], sequences(torch.device("cpu"))),
        scaling=0.1,
        e4m3_weights=True,
    )
    assert got.dtype == torch.float16
    assert error(got, want) < 2e-3


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, slot_T = heads(46, 3, 64).to(device), slots().to(device)
    cache = torch.zeros(BLOCKS, BLOCK, 3, 64, device=device)
    three = torch.ones(3, device=device)
    with pytest.raises(ValueError, match="does not hold 3 heads of 64"):
        write_cache(x, x, cache[:, :, :2], cache[:, :, :2], slot_T)
    with pytest.raises(ValueError, match="scales are for E4M3"):
        write_cache(x, x, cache, cache, slot_T, k_scale=three, v_scale=three)
    codes = cache.to(FP8)
    with pytest.raises(ValueError, match="2 scales for 3 heads"):
        write_cache(x, x, codes, codes, slot_T, k_scale=three[:2], v_scale=three)
    with pytest.raises(ValueError, match="do not fit queries"):
        paged_attention(x[:6, :2], cache, cache, sequences(device), scaling=1.0)
    with pytest.raises(ValueError, match="descales"):
        paged_attention(x[:6], codes, codes, sequences(device), scaling=1.0)
