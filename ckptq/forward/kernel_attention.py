"""Attention by our kernel, which records the maxima of q, k and v while it computes.

The kernel takes a mask as parameters (causal, a window, chunks); transformers hands over a tensor.
The parameters are read from the config and used only if they agree with the tensor. If they do
not, or if attention uses something that the kernel does not support, the caller falls back.

Shape letters: B batch, H query heads, K key/value heads, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ckptq.kernels.attention.mask import Mask, seen
from ckptq.kernels.attention.maxima import Maxima

UNDERSTOOD = ("scaling", "softcap", "sliding_window", "dropout", "is_causal")
HARMLESS = ("position_ids", "cache_position", "position_embeddings")
"""Arguments that some families pass to attention, which ignores them; so are flags that are off."""


def fused_attention(
    module: nn.Module,
    buffers: Callable[[], Maxima],
    lengths: Sequence[int],
    qkv_BHSD: tuple[Tensor, Tensor, Tensor],
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """Attention [B, S, H, D], its maxima folded into `buffers`; None if SDPA has to do it.

    `lengths` is the number of real positions in each row.
    """
    from ckptq.kernels.attention.dense_attention import attention

    query, key, value = qkv_BHSD
    real = tuple(lengths)
    words = in_words(module, real, query, key, attention_mask, kwargs)
    if words is None:
        return None
    return attention(
        *(query, key, value),
        scaling=words.scaling,
        mask=words.mask,
        softcap=words.softcap,
        spans=spans_of(real, query.device) if len(set(real)) > 1 else None,
        maxima=buffers(),
    )


@dataclass(frozen=True, slots=True)
class Words:
    """What attention does, as kernels take it."""

    mask: Mask
    scaling: float
    softcap: float | None = None


def in_words(
    module: nn.Module,
    lengths: tuple[int, ...],
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> Words | None:
    """What attention is asked for; None where kernels do not know it (sinks, a bias, other masks).

    `query` [B, H, S, D], `key` [B, K, S, D]; `lengths` is the number of real positions in each row.
    """
    if _unknown(kwargs) or query.shape[2] != key.shape[2]:
        return None
    mask = mask_in_words(module, kwargs)
    if not says_the_same(mask, attention_mask, lengths, query.shape[2]):
        return None
    scaling = kwargs.get("scaling")
    usual = query.shape[-1] ** -0.5
    return Words(mask, usual if scaling is None else scaling, kwargs.get("softcap"))


def _unknown(kwargs: Mapping[str, Any]) -> bool:
    """Whether attention has arguments that the kernel does not support (sinks, a bias)."""
    if kwargs.get("dropout") or kwargs.get("is_causal") is False:
        return True
    on = (key for key, value in kwargs.items() if value is not None and value is not False)
    return any(key not in UNDERSTOOD + HARMLESS for key in on)


def mask_in_words(module: Any, kwargs: Mapping[str, Any]) -> Mask:
    """What the config says about the attention of a module's layer."""
    config = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = kinds[index] if kinds is not None and index is not None else None
    window, chunk = kwargs.get("sliding_window"), None
    if kind == "sliding_attention" and window is None:
        window = getattr(config, "sliding_window", None)
    if kind == "chunked_attention":
        chunk = getattr(config, "attention_chunk_size", None)
    return Mask(sliding_window=window, chunk=chunk)


@lru_cache(maxsize=64)
def spans_of(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """First real position and number of real positions of each row, int32 [B]: padding is right."""
    length_B = torch.tensor(lengths, dtype=torch.int32, device=device)
    return torch.zeros_like(length_B), length_B


@lru_cache(maxsize=8)
def says_the_same(
    mask: Mask, attention_mask: Tensor | None, lengths: tuple[int, ...], S: int
) -> bool:
    """Whether parameters and tensor let every real position see the same.

    Compared again only for another mask: a layer gets one tensor for all batches of a shape, and
    reading a result back makes the host wait for everything queued on the device.
    """
    if attention_mask is None:
        full = spans_of((S,), torch.device("cpu"))
        plain_B1SS = seen(Mask(), S, S, full)
        return set(lengths) == {S} and torch.equal(seen(mask, S, S, full), plain_B1SS)
    if attention_mask.dtype != torch.bool or attention_mask.shape[-2:] != (S, S):
        return False
    spans = spans_of(lengths, attention_mask.device)
    padding_BS = torch.arange(S, device=attention_mask.device) >= spans[1][:, None]
    same_BHSS = seen(mask, S, S, spans) == attention_mask
    return bool((same_BHSS | padding_BS[:, None, :, None]).all())
