"""A scale per token and head: equal bits everywhere, errors as theory says, attention."""

import math

import pytest
import reference_cache as paged
import torch
import triton
import triton.language as tl
from kernel_cases import same
from kv_cases import BLOCK, BLOCKS, heads, per_sequence, sequences, slots
from torch import Tensor

from ckptq.kernels.attention.mask import Mask
from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.kv_codes import DECODERS, value_pairs
from ckptq.kernels.token_head.kv_format import (
    CENTROIDS,
    FORMATS,
    FP8,
    INT2,
    INT4,
    INT8,
    KVFormat,
    Rotation,
)
from ckptq.kernels.token_head.token_head_attention import token_head_attention
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache
from ckptq.kernels.token_head.write_token_head import write_token_head

KINDS = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda f: f.name)


def written(
    x_TKD: Tensor,
    fmt: KVFormat,
    slot_T: Tensor,
    device: torch.device,
    heads_first: bool = False,
    rotation: Rotation | None = None,
) -> TokenHeadCache:
    """A filled cache; its blocks have tokens, or heads, first in memory."""
    _, K, D = x_TKD.shape
    cache = TokenHeadCache.empty(fmt, BLOCKS, BLOCK, K, D, device=device, rotation=rotation)
    if heads_first:
        parts = {f: getattr(cache, f) for f in cache.__slots__}
        held = {f: parts[f] for f in ("code", "scale", "zero") if parts[f] is not None}
        turned = {f: x.transpose(1, 2).contiguous().transpose(1, 2) for f, x in held.items()}
        cache = TokenHeadCache(**parts | turned)
    write_token_head(x_TKD.to(device), cache, slot_T.to(device))
    return cache


def error(got: Tensor, want: Tensor) -> float:
    return ((got.cpu().double() - want.double()).norm() / want.double().norm()).item()


@KINDS
@pytest.mark.parametrize(
    ("D", "heads_first", "dtype", "rotation"),
    [
        (64, False, torch.bfloat16, None),
        (80, True, torch.float32, None),
        (96, False, torch.float16, Rotation.SIGNED),
        (128, True, torch.bfloat16, Rotation.NONE),
        (128, False, torch.float32, Rotation.HADAMARD),
        (72, False, torch.bfloat16, Rotation.SIGNED),
        (256, True, torch.bfloat16, Rotation.HADAMARD),
    ],
    ids=str,
)
def test_bytes_scales_and_zero_points_are_equal(
    device: torch.device,
    fmt: KVFormat,
    D: int,
    heads_first: bool,
    dtype: torch.dtype,
    rotation: Rotation | None,
) -> None:
    x, slot_T = heads(46, 3, D, dtype), slots()
    slot_T[[0, 7, 45]] = -1
    cache, want = (
        written(x, fmt, slot_T, device, heads_first, rotation),
        kv.quantize(x, fmt, rotation),
    )
    kept = slot_T >= 0
    for got, wanted in (
        (cache.code, want.code),
        (cache.scale, want.scale),
        (cache.zero, want.zero),
    ):
        if wanted is None:
            assert got is None
            continue
        row = got.flatten(0, 1).cpu()
        assert same(row[slot_T[kept]], wanted[kept])
        row[slot_T[kept]] = 0
        assert not row.any()  # nothing else was written


@pytest.mark.parametrize("K", [1, 4, 6])
def test_tiles_of_tokens_and_heads(device: torch.device, K: int) -> None:
    """Heads that are a power of two, or twice an odd number; tokens that do not fill a tile."""
    x, slot_T = heads(46, K, 64, torch.bfloat16), slots()
    cache, want = written(x, INT4, slot_T, device), kv.quantize(x, INT4)
    assert same(cache.code.flatten(0, 1).cpu()[slot_T], want.code)
    assert same(cache.scale.flatten(0, 1).cpu()[slot_T], want.scale)


def test_a_cache_whose_heads_lie_apart(device: torch.device) -> None:
    """Heads of 32 bytes, 38 from one to the next; what lies between stays as it was."""
    x, slot_T = heads(46, 2, 64, torch.bfloat16), slots()
    dense = TokenHeadCache.empty(INT4, BLOCKS, BLOCK, 2, 64, device=device)
    wide = torch.full((BLOCKS, BLOCK, 2, 38), 7, dtype=torch.uint8, device=device)
    apart = {f: getattr(dense, f) for f in dense.__slots__} | {"code": wide[..., :32]}
    write_token_head(x.to(device), TokenHeadCache(**apart), slot_T.to(device))
    got = wide.flatten(0, 1).cpu()[slot_T]
    assert same(got[..., :32], kv.quantize(x, INT4).code)
    assert (got[..., 32:] == 7).all()


@KINDS
def test_heads_whose_values_are_an_odd_step_apart(device: torch.device, fmt: KVFormat) -> None:
    """Two bf16 values are not a word then; nor are four bytes of the cache."""
    x, slot_T = heads(46, 3, 72, torch.bfloat16), slots()
    apart = torch.zeros(46, 3, 73, dtype=x.dtype)
    apart[..., 1:] = x
    dense = TokenHeadCache.empty(fmt, BLOCKS, BLOCK, 3, 72, device=device)
    width = fmt.width(72)
    wide = torch.zeros(BLOCKS, BLOCK, 3, width + 2, dtype=torch.uint8, device=device)
    cache = TokenHeadCache(
        **{f: getattr(dense, f) for f in dense.__slots__} | {"code": wide[..., 2:]}
    )
    write_token_head(apart.to(device)[..., 1:], cache, slot_T.to(device))
    got = wide.flatten(0, 1).cpu()[slot_T]
    assert same(got[..., 2:], kv.quantize(x, fmt).code)
    assert not got[..., :2].any()


@KINDS
@pytest.mark.parametrize("rotation", [Rotation.NONE, Rotation.SIGNED])
def test_heads_of_any_size(device: torch.device, fmt: KVFormat, rotation: Rotation) -> None:
    """From 2^-133, where bf16 is subnormal, to 2^117; values of a head up to 2^30 apart."""
    generator, slot_T = torch.Generator().manual_seed(5), slots()
    x = heads(46, 3, 128) * 2.0 ** torch.randint(-30, 1, (46, 3, 128), generator=generator)
    size = torch.ldexp(torch.ones(46), torch.linspace(-130, 113, 46).int())
    x = (x * size[:, None, None]).bfloat16()
    cache, want = written(x, fmt, slot_T, device, rotation=rotation), kv.quantize(x, fmt, rotation)
    assert same(cache.code.flatten(0, 1).cpu()[slot_T], want.code)
    assert same(cache.scale.flatten(0, 1).cpu()[slot_T], want.scale)
    assert want.scale.isfinite().all()


def test_rotations_that_would_not_be_exact_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="at most 256"):
        written(heads(46, 1, 512), INT4, slots(), device)


def test_golden_bytes() -> None:
    x = torch.tensor([[-3.0, 0.0, 12.0, 4.6] * 2])
    four = kv.quantize(x, INT4, Rotation.NONE)
    assert (four.scale.item(), four.zero.tolist()) == (1.0, [3])
    assert four.code.tolist() == [[0x30, 0x8F] * 2]  # codes 0, 3, 15, 8
    two = kv.quantize(torch.tensor([[-2.0, 0.0, 2.0, 0.5] * 2]), INT2, Rotation.NONE)
    assert two.scale.item() == pytest.approx(1.4361406, rel=1e-3)
    assert two.code.tolist() == [[0 | 2 << 2 | 3 << 4 | 2 << 6] * 2]
    eight = kv.quantize(x, INT8)
    assert eight.code.view(torch.int8).tolist() == [[-32, 0, 127, 49] * 2]
    assert torch.equal(kv.unpack(kv.pack(torch.arange(16), 2), 2), torch.arange(16))


def gaussian(D: int = 128) -> Tensor:
    return torch.randn(1, 4, 500, D, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rotation", list(Rotation))
def test_errors_on_a_gaussian_are_those_of_theory(rotation: Rotation) -> None:
    """Lloyd-Max with four levels leaves 0.1175 of the variance; a step s leaves s^2 / 12."""
    x = gaussian()
    packed = kv.quantize(x, INT4, rotation)
    step = (packed.scale.square().mean() / 12).sqrt().item()
    assert error(kv.there_and_back(x, INT4, rotation), x) == pytest.approx(step, 0.05)
    two = error(kv.there_and_back(x, INT2, rotation), x)
    assert two == pytest.approx(math.sqrt(0.1175), rel=0.03)
    assert error(kv.there_and_back(x, INT8, rotation), x) < 0.008
    assert error(kv.there_and_back(x, FP8, rotation), x) < 0.03


def test_the_rotation_saves_heads_with_an_outlier() -> None:
    x = gaussian()
    x[..., 17] *= 30
    rest = [i for i in range(128) if i != 17]

    def left(fmt: KVFormat, rotation: Rotation | None) -> float:
        return error(kv.there_and_back(x, fmt, rotation)[..., rest], x[..., rest])

    assert left(INT4, None) < 0.6 * left(INT4, Rotation.NONE)
    assert left(INT2, Rotation.NONE) > 0.8


@pytest.mark.parametrize("D", [64, 72, 80, 96, 128, 256])
@KINDS
def test_attention(device: torch.device, fmt: KVFormat, D: int) -> None:
    q, k, v = heads(6, 4, D, seed=2), heads(46, 2, D), heads(46, 2, D, seed=1)
    caches = [written(x, fmt, slots(), device) for x in (k, v)]
    got = token_head_attention(q.to(device), *caches, sequences(device), scaling=D**-0.5)
    held = [per_sequence(kv.dequantize(kv.quantize(x, fmt), fmt)) for x in (k, v)]
    cpu = sequences(torch.device("cpu"))
    want = paged.attention(q, *held, cpu, scaling=D**-0.5)
    assert got.dtype == q.dtype
    assert error(got, want) < 2e-6
    plain = paged.attention(q, per_sequence(k), per_sequence(v), cpu, scaling=D**-0.5)
    assert error(got, plain) < {8: 0.06, 4: 0.25, 2: 1.0}[fmt.bits]


@KINDS
def test_attention_in_bf16_with_masks(device: torch.device, fmt: KVFormat) -> None:
    D, run = 64, {"scaling": 0.1, "mask": Mask(sliding_window=20, chunk=32), "softcap": 30.0}
    q = heads(6, 4, D, torch.bfloat16, seed=2)
    k, v = heads(46, 2, D, torch.bfloat16), heads(46, 2, D, torch.bfloat16, seed=1)
    caches = [written(x, fmt, slots(), device, True) for x in (k, v)]
    got = token_head_attention(q.to(device), *caches, sequences(device), **run)
    held = [per_sequence(kv.dequantize(kv.quantize(x, fmt), fmt)) for x in (k, v)]
    want = paged.attention(q, *held, sequences(torch.device("cpu")), **run)
    assert error(got, want) < 1.5e-2


@pytest.mark.parametrize("forgotten", ["k zero", "v zero", "k scale", "v scale", "rotation"])
def test_what_is_forgotten_is_noticed(device: torch.device, forgotten: str) -> None:
    D, cpu = 64, sequences(torch.device("cpu"))
    q, k, v = heads(6, 4, D, seed=2), heads(46, 2, D), heads(46, 2, D, seed=1)
    key, value = (written(x, INT4, slots(), device) for x in (k, v))
    held = [per_sequence(kv.dequantize(kv.quantize(x, INT4), INT4)) for x in (k, v)]
    want = paged.attention(q, *held, cpu, scaling=0.1)
    cache = key if forgotten.startswith("k") else value
    if forgotten.endswith("zero"):
        cache.zero.zero_()
    elif forgotten.endswith("scale"):
        cache.scale.copy_(cache.scale.flip(-1))  # NHD: the other head's
    else:
        key = TokenHeadCache(
            **{f: getattr(key, f) for f in key.__slots__} | {"rotation": Rotation.NONE}
        )
    got = token_head_attention(q.to(device), key, value, sequences(device), scaling=0.1)
    assert error(got, want) > 0.02


def test_a_head_of_zeros_stays_small_and_scales_stay_positive() -> None:
    for fmt in FORMATS.values():
        packed = kv.quantize(torch.zeros(2, 3, 64), fmt)
        assert (packed.scale > 0).all()
        assert kv.dequantize(packed, fmt).abs().max() < 1e-6  # INT2 has no code for zero


def test_a_head_that_packed_codes_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="head size in eights"):
        kv.there_and_back(torch.zeros(1, 2, 4, 62), INT2)


@pytest.mark.parametrize("fmt", [INT8, FP8], ids=lambda f: f.name)
def test_heads_of_an_odd_size(device: torch.device, fmt: KVFormat) -> None:
    """Whole bytes and no rotation ask nothing of a head's size; packed formats refuse it."""
    q, x = heads(6, 4, 81, seed=2), heads(46, 2, 81)
    cache = written(x, fmt, slots(), device)
    want = kv.quantize(x, fmt)
    assert same(cache.code.flatten(0, 1).cpu()[slots()], want.code)
    got = token_head_attention(q.to(device), cache, cache, sequences(device), scaling=0.1)
    held = per_sequence(kv.dequantize(want, fmt))
    assert (
        error(got, paged.attention(q, held, held, sequences(torch.device("cpu")), scaling=0.1))
        < 2e-6
    )
    with pytest.raises(ValueError, match="head size in eights"):
        TokenHeadCache.empty(INT4, BLOCKS, BLOCK, 2, 81, device=device)


@triton.jit
def _values_kernel(word_ptr, out_ptr, PLACE: tl.constexpr, DECODER: tl.constexpr):
    o_N = tl.arange(0, 64)
    one = tl.reshape(tl.load(word_ptr + o_N), (4, 8, 2, 1, 1, 1))
    other = tl.reshape(tl.load(word_ptr + 63 - o_N), (4, 8, 2, 1, 1, 1))
    magic = (DECODER[2], DECODER[3])
    pairs = value_pairs((one, other), magic, PLACE, DECODER, out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.arange(0, 512), tl.reshape(pairs, (512,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@KINDS
def test_every_byte_stands_for_its_value(
    fmt: KVFormat, dtype: torch.dtype, device: torch.device
) -> None:
    """To the bit, but for INT2's levels in fp16. A NaN of E4M3 is no value: writers saturate."""
    byte = torch.arange(256, dtype=torch.uint8)
    levels = torch.tensor([-CENTROIDS[1], -CENTROIDS[0], *CENTROIDS])
    kind = fmt.name.partition("_")[0]
    for place in range(fmt.per_byte):
        code = byte.int() >> fmt.bits * place & 2**fmt.bits - 1
        if fmt.bits == 8:
            want = byte.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn).float()
        else:
            want = code.float() if kind == "int4" else levels[code]
        got = torch.empty(64, 4, 2, dtype=dtype, device=device)
        _values_kernel[(1,)](
            byte.view(torch.int32).to(device), got, PLACE=place, DECODER=DECODERS[kind], num_warps=1
        )
        got = got.cpu().float() * DECODERS[kind][1]
        words = want.view(64, 4)
        want = torch.stack([words, words.flip(0)], 2)
        finite = ~want.isnan()
        assert finite.sum() >= 2 * 254
        off = 1.5e-4 if kind == "int2" else 0.0
        torch.testing.assert_close(got[finite], want[finite], rtol=off, atol=0.0)
