"""Attention over a real paged cache, written and read by the kernels, as an engine has it.

Static FP8: keys and values are written as E4M3 under their scales, q is rounded to E4M3 too, and so
are the softmax's weights, as in FlashAttention 3. Scales per token and head: INT8, FP8, INT4 and
INT2 with their rotation.

Shape letters: B batch, H query heads, K KV heads, S positions, D head size, T tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from ckptq.evaluate.caches.kv_cache import STATIC, KVCache
from ckptq.kernels.token_head.kv_format import FORMATS, rotation_block

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ckptq.forward.kernel_attention import Words
    from ckptq.kernels.cache.paging import Sequences
    from ckptq.kernels.token_head.token_head_cache import TokenHeadCache

BLOCK = 16
"""Tokens of a page, vLLM's default."""


def pages_serve(device: torch.device) -> bool:
    """Whether attention of a row with a cache goes over pages there: on a GPU it does."""
    return device.type == "cuda"


def unpaged(cache: KVCache, key: Tensor, value: Tensor) -> str | None:
    """Why such keys and values [B, K, S, D] are not held in pages; None where they are."""
    if key.shape != value.shape:
        return f"values of {value.shape[3]} beside keys of {key.shape[3]}"
    if cache.toward_zero:
        return "a cache that truncates"
    if cache.mode not in STATIC and rotation_block(key.shape[3]) < 8:
        return f"a head size of {key.shape[3]}"
    return None


def paged(
    cache: KVCache, scales: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, asked: Words
) -> Tensor:
    """Attention [B, S, H, D] of q [B, H, S, D] over k and v [B, K, S, D] held in such a cache.

    `scales` of "q", "k" and "v", one a head, are of static caches. Every row is a sequence; padding
    at its end is seen by nobody under a causal mask.
    """
    import torch

    B, _, S, _ = q.shape
    q_THD, k_TKD, v_TKD = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    slot_T, sequences = _pages(B, S, q.device)
    with torch.cuda.device_of(q):  # triton launches on the current device
        if cache.mode in STATIC:
            out = _static(cache, scales, (q_THD, k_TKD, v_TKD), slot_T, sequences, asked)
        else:
            out = _dynamic(cache, (q_THD, k_TKD, v_TKD), slot_T, sequences, asked)
    return out.unflatten(0, (B, S))


def _static(
    cache: KVCache,
    scales: Mapping[str, Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    slot_T: Tensor,
    sequences: Sequences,
    asked: Words,
) -> Tensor:
    import torch

    from ckptq.kernels.cache.dispatch import paged_attention, write_cache

    FP8 = torch.float8_e4m3fn

    q_THD, k_TKD, v_TKD = qkv
    shape = (sequences.block_table.numel(), BLOCK, *k_TKD.shape[1:])
    keys, values = (torch.empty(shape, dtype=FP8, device=k_TKD.device) for _ in "kv")
    write_cache(k_TKD, v_TKD, keys, values, slot_T, k_scale=scales["k"], v_scale=scales["v"])
    descales: tuple[Tensor | float, Tensor | float, Tensor | float]
    descales = 1.0, scales["k"], scales["v"]
    query = q_THD
    if cache.query:
        query, descales = _in_e4m3(q_THD, scales["q"]), (scales["q"], scales["k"], scales["v"])
    return paged_attention(
        *(query, keys, values, sequences),
        scaling=asked.scaling,
        mask=asked.mask,
        softcap=asked.softcap,
        descales=descales,
        dtype=q_THD.dtype,
    )


def _in_e4m3(q_THD: Tensor, scale_H: Tensor) -> Tensor:
    from ckptq.kernels.quantize.dispatch import quantize_static

    T, H, D = q_THD.shape
    return quantize_static(q_THD.flatten(1), scale_H.view(1, H), (T, D)).view(T, H, D)


def _dynamic(
    cache: KVCache,
    qkv: tuple[Tensor, Tensor, Tensor],
    slot_T: Tensor,
    sequences: Sequences,
    asked: Words,
) -> Tensor:
    from ckptq.kernels.token_head.dispatch import token_head_attention

    q_THD, k_TKD, v_TKD = qkv
    keys, values = (_written(cache, x_TKD, slot_T, sequences) for x_TKD in (k_TKD, v_TKD))
    return token_head_attention(
        *(q_THD, keys, values, sequences),
        scaling=asked.scaling,
        mask=asked.mask,
        softcap=asked.softcap,
    )


def _written(cache: KVCache, x_TKD: Tensor, slot_T: Tensor, sequences: Sequences) -> TokenHeadCache:
    """Keys or values in pages of their own."""
    from ckptq.kernels.token_head.dispatch import write_token_head
    from ckptq.kernels.token_head.token_head_cache import TokenHeadCache

    _, K, D = x_TKD.shape
    made = TokenHeadCache.empty(
        *(FORMATS[cache.mode.replace("-", "_")], sequences.block_table.numel(), BLOCK, K, D),
        device=x_TKD.device,
        rotation=cache.rotation,
    )
    write_token_head(x_TKD, made, slot_T)
    return made


@lru_cache(maxsize=8)
def _pages(B: int, S: int, device: torch.device) -> tuple[Tensor, Sequences]:
    """The slot of every token, and B sequences of S keys and queries, each on pages of its own."""
    import torch

    from ckptq.kernels.cache.paging import Sequences

    pages = -(-S // BLOCK)
    row_B1 = torch.arange(B, device=device)[:, None]
    slot_BS = row_B1 * pages * BLOCK + torch.arange(S, device=device)
    table_BL = row_B1 * pages + torch.arange(pages, device=device)
    starts = torch.arange(B + 1, device=device) * S
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    return slot_BS.flatten(), Sequences(
        query_starts=starts.int(), lengths=lengths, block_table=table_BL.int(), longest=S
    )
