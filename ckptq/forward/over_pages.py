"""Attention over a real paged cache, written and read by the kernels, as an engine has it.

Every row of a batch is a sequence with pages of its own; padding at its end is seen by nobody under
a causal mask.

Shape letters: B batch, H query heads, K KV heads, S positions, D head size, T tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.gpu import on_gpu
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache

if TYPE_CHECKING:
    from ckptq.forward.kernel_attention import Words
    from ckptq.kernels.token_head.kv_format import KVFormat, Rotation

    Qkv = tuple[Tensor, Tensor, Tensor]

BLOCK = 16
"""Tokens of a page, vLLM's default."""


def pages_serve(device: torch.device) -> bool:
    """Whether attention with a quantized cache goes over pages there: on a GPU it does; on a CPU
    q, k and v are rounded where they are."""
    return on_gpu(device)


def over_static_fp8(
    qkv_BHSD: Qkv, scales: Mapping[str, Tensor], asked: Words, *, round_query: bool = True
) -> Tensor:
    """Attention [B, S, H, D] over keys and values in E4M3 under scales of "k" and "v", one a head.

    With `round_query` q is E4M3 too, under the scales of "q", and so are the softmax's weights, as
    in FlashAttention 3.
    """
    from ckptq.kernels.cache.paged_attention import paged_attention
    from ckptq.kernels.cache.write_cache import write_cache

    q_BHSD = qkv_BHSD[0]
    q_THD, k_TKD, v_TKD = (x.transpose(1, 2).flatten(0, 1) for x in qkv_BHSD)
    slot_T, sequences = _pages(len(q_BHSD), q_BHSD.shape[2], q_BHSD.device)
    shape = (sequences.block_table.numel(), BLOCK, *k_TKD.shape[1:])
    keys, values = (
        torch.empty(shape, dtype=torch.float8_e4m3fn, device=k_TKD.device) for _ in "kv"
    )
    query, q_scale = q_THD, torch.ones(1, device=q_THD.device)
    with torch.cuda.device_of(q_THD):  # triton launches on the current device
        write_cache(k_TKD, v_TKD, keys, values, slot_T, k_scale=scales["k"], v_scale=scales["v"])
        if round_query:
            query, q_scale = _in_e4m3(q_THD, scales["q"]), scales["q"]
        out_THD = paged_attention(
            *(query, keys, values, sequences),
            scaling=asked.scaling,
            mask=asked.mask,
            softcap=asked.softcap,
            descales=(q_scale, scales["k"], scales["v"]),
            dtype=q_THD.dtype,
        )
    return out_THD.unflatten(0, (len(q_BHSD), -1))


def over_tokens_and_heads(
    qkv_BHSD: Qkv, fmt: KVFormat, rotation: Rotation | None, asked: Words
) -> Tensor:
    """Attention [B, S, H, D] over keys and values with a scale for each head of each token.

    `rotation` replaces the format's own.
    """
    from ckptq.kernels.token_head.token_head_attention import token_head_attention

    q_BHSD = qkv_BHSD[0]
    q_THD, *pair = (x.transpose(1, 2).flatten(0, 1) for x in qkv_BHSD)
    slot_T, sequences = _pages(len(q_BHSD), q_BHSD.shape[2], q_BHSD.device)
    with torch.cuda.device_of(q_THD):  # triton launches on the current device
        keys, values = (_written(x_TKD, fmt, rotation, slot_T, sequences) for x_TKD in pair)
        out_THD = token_head_attention(
            *(q_THD, keys, values, sequences),
            scaling=asked.scaling,
            mask=asked.mask,
            softcap=asked.softcap,
        )
    return out_THD.unflatten(0, (len(q_BHSD), -1))


def _in_e4m3(q_THD: Tensor, scale_H: Tensor) -> Tensor:
    from ckptq.kernels.quantize.quantize_static import quantize_static

    T, H, D = q_THD.shape
    scale_1H = scale_H.reshape(1, H).contiguous()
    return quantize_static(q_THD.flatten(1), scale_1H, (T, D)).view(T, H, D)


def _written(
    x_TKD: Tensor,
    fmt: KVFormat,
    rotation: Rotation | None,
    slot_T: Tensor,
    sequences: Sequences,
) -> TokenHeadCache:
    """Keys or values in their pages."""
    from ckptq.kernels.token_head.write_token_head import write_token_head

    _, K, D = x_TKD.shape
    pages = sequences.block_table.numel()
    made = TokenHeadCache.empty(fmt, pages, BLOCK, K, D, device=x_TKD.device, rotation=rotation)
    write_token_head(x_TKD, made, slot_T)
    return made


@lru_cache(maxsize=8)
def _pages(B: int, S: int, device: torch.device) -> tuple[Tensor, Sequences]:
    """The slot of every token, and B sequences of S keys and queries."""
    pages = -(-S // BLOCK)
    row_B1 = torch.arange(B, device=device)[:, None]
    slot_BS = row_B1 * pages * BLOCK + torch.arange(S, device=device)
    table_BL = row_B1 * pages + torch.arange(pages, device=device)
    starts = torch.arange(B + 1, device=device) * S
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    return slot_BS.flatten(), Sequences(
        query_starts=starts.int(), lengths=lengths, block_table=table_BL.int(), longest=S
    )
