"""Elements more than 2^31 apart: addresses need 64 bits wherever a stride is multiplied.

Inputs and caches are views into memory that is reserved and, but for what they touch, never used;
what kernels allocate themselves is that large on a GPU only.
"""

import mmap

import numpy as np
import pytest
import reference_int4 as int4_meaning
import reference_quantize as meaning
import torch
import triton
import triton.language as tl
from kernel_cases import both_same, same, weights
from kv_cases import BLOCK, heads, sequences, slots
from torch import Tensor

from ckptq.kernels.attention.dense_attention import Tile, attention
from ckptq.kernels.cache.paged_attention import paged_attention
from ckptq.kernels.cache.write_cache import write_cache
from ckptq.kernels.int4.quantize_int4 import dequantize_int4, quantize_int4
from ckptq.kernels.linear.linear_w4a16 import linear_w4a16
from ckptq.kernels.linear.linear_w8a8 import linear_fp8_block, linear_w8a8
from ckptq.kernels.quantize.quantize_rows import quantize_blocks, quantize_rows
from ckptq.kernels.quantize.quantize_static import dequantize, quantize_static
from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.kv_format import FORMATS, KVFormat
from ckptq.kernels.token_head.token_head_attention import token_head_attention
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache
from ckptq.kernels.token_head.write_token_head import write_token_head

FP8 = torch.float8_e4m3fn
LARGE = 12 << 30
"""Bytes: 3 x 2^30 words of 32 bits."""
FAR = 1 << 31


@pytest.fixture
def memory(device: torch.device) -> Tensor:
    """Bytes of which a CPU holds those that are touched."""
    if device.type == "cuda":
        return torch.zeros(LARGE, dtype=torch.uint8, device=device)
    no_reserve = 0x4000  # Linux' MAP_NORESERVE, which Python does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, LARGE, flags), dtype=torch.uint8)


def placed(memory: Tensor, x: Tensor, strides: tuple[int, ...], begin: int = 0) -> Tensor:
    """x as a view with these strides, its last element beyond 2^31."""
    far = memory.view(x.dtype).as_strided(x.shape, strides, begin)
    assert sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) >= FAR
    return far.copy_(x)


def test_rows(memory: Tensor) -> None:
    x = weights((6, 64))
    far = placed(memory, x, (1 << 29, 1))
    assert both_same(quantize_rows(far), meaning.quantize_rows(x))
    assert both_same(quantize_blocks(far, FP8, (4, 32)), meaning.quantize_blocks(x, FP8, (4, 32)))
    scale = torch.full((1, 1), 0.01)
    got = quantize_static(far, scale.to(far.device), (6, 64))
    assert same(got, meaning.quantize_static(x, scale, (6, 64), FP8))
    for symmetric in (True, False):
        pairs = zip(
            quantize_int4(far, 32, symmetric),
            int4_meaning.quantize_int4(x, 32, symmetric),
            strict=True,
        )
        assert all(same(got, want) for got, want in pairs if want is not None)


def test_products(memory: Tensor) -> None:
    """A view of activations or weights gives what a dense copy does."""
    (a, a_scale), (w, w_scale) = (meaning.quantize_rows(weights((5, 128), seed=n)) for n in (1, 2))
    packed, groups, _ = int4_meaning.quantize_int4(weights((5, 128), seed=2), 32)
    dense = [x.to(memory.device) for x in (a, a_scale, w, w_scale, packed, groups)]
    a, a_scale, w, w_scale, packed, groups = dense
    far_a = placed(memory, a.view(torch.uint8), (1 << 30, 1)).view(FP8)
    far_w = placed(memory, w.view(torch.uint8), (1 << 30, 1), begin=1024).view(FP8)
    want = linear_w8a8(a, a_scale, w, w_scale)
    assert want.any()
    assert torch.equal(linear_w8a8(far_a, a_scale, far_w, w_scale), want)
    block = linear_fp8_block(a, a_scale, w, w_scale[:1])
    assert torch.equal(linear_fp8_block(far_a, a_scale, far_w, w_scale[:1]), block)
    values = a.to(torch.bfloat16)
    far = placed(memory, values, (1 << 29, 1), begin=4096)
    assert torch.equal(linear_w4a16(far, packed, groups), linear_w4a16(values, packed, groups))


@pytest.mark.parametrize(
    "strides",
    [(1 << 31, 80 * 64, 64, 1), (80 * 128, 1 << 31, 64, 1), (64, 128, 1 << 25, 1)],
    ids=["batch", "head", "token"],
)
def test_attention(memory: Tensor, strides: tuple[int, int, int, int]) -> None:
    q, k, v = (heads(160, 2, 64, torch.bfloat16, seed=n) for n in range(3))
    dense = [x.view(2, 80, 2, 64).transpose(1, 2).to(memory.device) for x in (q, k, v)]
    run = {"scaling": 0.1, "tile": Tile(32, 128, 4, 1)}
    want = attention(*dense, **run)
    for i, x in enumerate(dense):
        far = [*dense[:i], placed(memory, x, strides), *dense[i + 1 :]]
        assert torch.equal(attention(*far, **run), want)


def test_static_caches(memory: Tensor) -> None:
    """A block is at 10 x 2^28 of the bf16 cache, and keys are 2^26 apart."""
    device = memory.device
    k = heads(46, 2, 64, torch.bfloat16)
    empty = torch.zeros(11, BLOCK, 2, 64, dtype=k.dtype)
    far = placed(memory, empty, (1 << 28, *empty.stride()[1:]))
    x = placed(memory, k, (1 << 26, 64, 1), begin=1 << 20)
    near = empty.to(device)
    write_cache(k.to(device), k.to(device), near, near, slots().to(device))
    write_cache(x, x, far, far, slots().to(device))
    assert torch.equal(far, near)
    assert near.any()
    q = heads(6, 4, 64, torch.bfloat16, seed=2).to(device)
    run = {"scaling": 0.1}
    want = paged_attention(q, near, near, sequences(device), **run)
    assert torch.equal(paged_attention(q, far, far, sequences(device), **run), want)


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda f: f.name)
def test_caches_with_a_scale_per_token_and_head(memory: Tensor, fmt: KVFormat) -> None:
    """More than 2^31 even in words of four bytes, as which packed codes are stored."""
    device, x = memory.device, heads(46, 2, 64, torch.bfloat16)
    near = TokenHeadCache.empty(fmt, 11, BLOCK, 2, 64, device=device)
    parts = {f: getattr(near, f) for f in near.__slots__}
    code = placed(memory, parts["code"], (1 << 30, *near.code.stride()[1:]))
    far = TokenHeadCache(**parts | {"code": code})
    write_token_head(x.to(device), far, slots().to(device))
    want = kv.quantize(x, fmt)
    assert same(far.code.flatten(0, 1).cpu()[slots()], want.code)
    assert same(far.scale.flatten(0, 1).cpu()[slots()], want.scale)
    near.code.copy_(far.code)
    q = heads(6, 4, 64, torch.bfloat16, seed=2).to(device)
    want_out = token_head_attention(q, near, near, sequences(device), scaling=0.1)
    assert want_out.any()
    got = token_head_attention(q, far, far, sequences(device), scaling=0.1)
    assert torch.equal(got, want_out)


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda f: f.name)
def test_tokens_far_apart(memory: Tensor, fmt: KVFormat) -> None:
    """So far that not even those of one tile are within 2^31."""
    x, slot_T = heads(20, 2, 64, torch.bfloat16), slots()[:20]
    cache = TokenHeadCache.empty(fmt, 11, BLOCK, 2, 64, device=memory.device)
    far = placed(memory, x, (1 << 27, 64, 1))
    write_token_head(far, cache, slot_T.to(memory.device))
    assert same(cache.code.flatten(0, 1).cpu()[slot_T], kv.quantize(x, fmt).code)


@triton.jit
def _offsets_kernel(out_ptr, stride, WIDE: tl.constexpr):
    o_N = tl.arange(0, 8)
    if WIDE:
        o_N = o_N.to(tl.int64)
    tl.store(out_ptr + tl.arange(0, 8), (o_N * stride).to(tl.int64))


@pytest.mark.parametrize("wide", [True, False])
def test_32_bits_would_be_noticed(device: torch.device, wide: bool) -> None:
    """The twin: the interpreter multiplies in as few bits as a GPU does."""
    out = torch.zeros(8, dtype=torch.int64, device=device)
    with np.errstate(over="ignore"):
        _offsets_kernel[(1,)](out, 1 << 29, WIDE=wide)
    assert (out.tolist() == [i << 29 for i in range(8)]) == wide


@pytest.mark.skipif(not torch.cuda.is_available(), reason="results of 2^31 codes need a GPU")
def test_results_of_more_than_two_to_the_31() -> None:
    """The last rows of 524304 x 4096, and the same rows alone."""
    x = torch.randn(1 << 19 | 16, 4096, device="cuda").bfloat16()
    end = x[-24:]
    code, scale = quantize_rows(x)
    alone = quantize_rows(end)
    assert torch.equal(code[-24:].view(torch.uint8), alone[0].view(torch.uint8))
    assert torch.equal(scale[-24:], alone[1])
    assert torch.equal(dequantize(code, scale, (1, 4096))[-24:], dequantize(*alone, (1, 4096)))
    code, _ = quantize_blocks(x, block=(8, 128))
    assert torch.equal(
        code[-24:].view(torch.int8), quantize_blocks(end, block=(8, 128))[0].view(torch.int8)
    )
    del code
    packed, scale, zero = quantize_int4(x, 128, False)
    alone = quantize_int4(end, 128, False)
    assert torch.equal(packed[-24:], alone[0])
    assert torch.equal(zero[-3:], alone[2])
    back = dequantize_int4(packed, scale, 4096, zero)
    assert torch.equal(back[-24:], dequantize_int4(alone[0], alone[1], 4096, alone[2]))
    del back, packed
