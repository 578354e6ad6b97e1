"""Slots as engines hand them over, views of a fused projection, and caches that are not a pair."""

from collections.abc import Callable

import pytest
import reference_cache as paged
import torch
from kernel_cases import same
from kv_cases import BLOCK, BLOCKS, heads
from torch import Tensor

from ckptq.kernels.cache.write_cache import write_cache
from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.kv_format import FORMATS, INT4, INT8, KVFormat, Rotation
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache
from ckptq.kernels.token_head.write_token_head import write_token_head

FP8 = torch.float8_e4m3fn
K = 2
SLOTS: dict[str, Callable[[], Tensor]] = {
    "none": lambda: torch.zeros(0, dtype=torch.int64),
    "one": lambda: torch.tensor([87]),
    "fewer than tokens": lambda: torch.tensor([5, -1, 30]),
    "all skipped": lambda: torch.full((20,), -1),
    "int32": lambda: torch.arange(20, dtype=torch.int32),
    "every second of a tensor": lambda: torch.arange(0, 40, 2),
}
"""For 20 tokens, of which those past the last slot pad a batch."""


def handed_over(slot_T: Tensor, kind: str, device: torch.device) -> Tensor:
    """On the device, with other numbers between where a tensor has them."""
    if kind.startswith("every second"):
        return torch.stack([slot_T, slot_T + 1], 1).to(device)[:, 0]
    return slot_T.to(device)


def fused(D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values bf16 [20, K, D] as they lie in the output of one q/k/v projection."""
    qkv = heads(20, 4 + 2 * K, D, torch.bfloat16).flatten(1).to(device)
    key, value = qkv[:, 4 * D :].unflatten(1, (2 * K, D)).chunk(2, 1)
    return key, value


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("D", [64, 256])
@pytest.mark.parametrize("kind", SLOTS)
def test_static_caches(device: torch.device, kind: str, D: int, dtype: torch.dtype) -> None:
    key, value = fused(D, device)
    slot_T = SLOTS[kind]()
    scale = torch.tensor([0.01, 0.02]) if dtype == FP8 else None
    want = [torch.full((BLOCKS, BLOCK, K, D), 0.5).to(dtype) for _ in "kv"]
    got = [cache.to(device, copy=True) for cache in want]
    for x, cache in zip((key, value), want, strict=True):
        paged.write(x[: len(slot_T)].cpu(), cache, slot_T, scale)
    on_device = None if scale is None else scale.to(device)
    there = handed_over(slot_T, kind, device)
    write_cache(key, value, *got, there, k_scale=on_device, v_scale=on_device)
    assert same(got[0], want[0])
    assert same(got[1], want[1])


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda f: f.name)
@pytest.mark.parametrize("kind", SLOTS)
def test_caches_with_a_scale_per_token_and_head(
    device: torch.device, kind: str, fmt: KVFormat
) -> None:
    _, value = fused(64, device)
    slot_T = SLOTS[kind]()
    cache = TokenHeadCache.empty(fmt, BLOCKS, BLOCK, K, 64, device=device)
    write_token_head(value, cache, handed_over(slot_T, kind, device))
    kept, want = slot_T >= 0, kv.quantize(value[: len(slot_T)].cpu(), fmt)
    code = cache.code.flatten(0, 1).cpu()
    scale = cache.scale.flatten(0, 1).cpu()
    assert same(code[slot_T[kept].long()], want.code[kept])
    assert same(scale[slot_T[kept].long()], want.scale[kept])
    assert int((scale != 0).sum()) == K * int(kept.sum())  # nothing else was written


def test_slots_that_do_not_fit_are_refused(device: torch.device) -> None:
    key, value = fused(64, device)
    caches = [torch.zeros(BLOCKS, BLOCK, K, 64, dtype=key.dtype, device=device) for _ in "kv"]
    cache = TokenHeadCache.empty(INT8, BLOCKS, BLOCK, K, 64, device=device)
    slot_T = torch.arange(21, device=device)
    for wrong, message in (
        (slot_T, r"slots \[21\] for 20 tokens"),
        (slot_T[:20].float(), "want int32 or int64"),
        (slot_T[:20, None], r"slots \[20, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            write_cache(key, value, *caches, wrong)
        with pytest.raises(ValueError, match=message):
            write_token_head(value, cache, wrong)


def test_keys_and_values_that_are_no_pair_are_refused(device: torch.device) -> None:
    key, value = fused(64, device)
    slot_T, scale = torch.arange(20, device=device), torch.ones(1, device=device)
    plain = torch.zeros(BLOCKS, BLOCK, K, 64, dtype=key.dtype, device=device)
    codes = plain.to(FP8)
    with pytest.raises(ValueError, match="typed alike"):  # E4M3 keys beside plain values
        write_cache(key, value, codes, plain, slot_T, k_scale=scale)
    with pytest.raises(ValueError, match="typed alike"):
        write_cache(key, value.float(), codes, codes, slot_T, k_scale=scale, v_scale=scale)
    with pytest.raises(ValueError, match="shaped and typed"):
        write_cache(key, value, plain, plain[1:], slot_T)
    with pytest.raises(ValueError, match="laid out alike"):
        write_cache(key, value, plain, plain.transpose(1, 2).contiguous().transpose(1, 2), slot_T)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scale", lambda x: x[:, :, :1], "codes, scales, zero points"),
        ("zero", lambda _: None, "codes, scales, zero points"),
        ("zero", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "laid out alike"),
        ("code", lambda x: x[..., :16], "codes, scales, zero points"),
        ("code", lambda x: x.mT.contiguous().mT, "lie apart"),
    ],
)
def test_a_cache_in_pieces_is_refused(
    part: str, change: Callable[[Tensor], Tensor | None], message: str
) -> None:
    cache = TokenHeadCache.empty(INT4, BLOCKS, BLOCK, K, 64, device=torch.device("cpu"))
    parts = {f: getattr(cache, f) for f in cache.__slots__}
    with pytest.raises(ValueError, match=message):
        TokenHeadCache(**parts | {part: change(parts[part])})
    TokenHeadCache(**parts | {"rotation": Rotation.NONE})
