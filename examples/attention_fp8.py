"""What FP8 attention with given scales does to an example model, played in plain torch.

A few lines of their own rather than ckptq's code, so that the example does not depend on what it
is there to test. Rounds q, k and v to E4M3 as a static scale would and attends in the model's
dtype; how an engine accumulates is left out.

Shape letters: B batch, H heads (of q or of k/v), S sequence, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

E4M3_MAX = 448.0


class Heads(NamedTuple):
    """One number per head of one attention layer."""

    q: Tensor
    k: Tensor
    v: Tensor


HeadsByLayer = Mapping[int, Heads]
Hook = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(layer, q, k, v) [B, H, S, D] as they go into attention, and as they shall be used."""


@contextmanager
def attention_hook(model: PreTrainedModel, hook: Hook) -> Iterator[None]:
    """Let `hook` see and replace q, k and v (after RoPE and norms) of every attention layer."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module, query, key, value, *args, **kwargs):  # type: ignore[no-untyped-def]
        query, key, value = hook(module.layer_idx, query, key, value)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("hooked", attend)
    AttentionMaskInterface.register("hooked", sdpa_mask)
    model.set_attn_implementation("hooked")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def head_sizes(model: PreTrainedModel, ids_BT: Tensor) -> dict[int, Heads]:
    """Largest magnitude of q, k and v per head and layer over `ids_BT`."""
    sizes: dict[int, Heads] = {}

    def measure(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes[layer] = Heads(*(x_BHSD.float().abs().amax((0, 2, 3)) for x_BHSD in (q, k, v)))
        return q, k, v

    with attention_hook(model, measure):
        model(input_ids=ids_BT, use_cache=False)
    return sizes


def fake_quantize(x_BHSD: Tensor, scale_H: Tensor) -> Tensor:
    """Round to the nearest E4M3 multiple of the head's scale; beyond 448 scales it saturates."""
    scale_H11 = scale_H.view(-1, 1, 1)
    codes_BHSD = (x_BHSD.float() / scale_H11).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes_BHSD.float() * scale_H11).to(x_BHSD.dtype)


@contextmanager
def quantized_attention(model: PreTrainedModel, scales: HeadsByLayer) -> Iterator[None]:
    """Run `model` with q, k and v rounded to FP8 with these scales."""

    def quantize(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = scales[layer]
        return fake_quantize(q, scale.q), fake_quantize(k, scale.k), fake_quantize(v, scale.v)

    with attention_hook(model, quantize):
        yield


def scales_per_head(sizes: HeadsByLayer) -> dict[int, Heads]:
    """Static scales that map each head's largest magnitude to 448."""
    return {
        layer: Heads(*(size_H / E4M3_MAX for size_H in heads)) for layer, heads in sizes.items()
    }


def shared_by_all_heads(scales: HeadsByLayer) -> dict[int, Heads]:
    """One scale per tensor: the largest head's, for all of them."""
    return {
        layer: Heads(*(scale_H.max().expand_as(scale_H) for scale_H in heads))
        for layer, heads in scales.items()
    }


def lost(scales: HeadsByLayer) -> dict[int, Heads]:
    """Scales of 1.0, which is what vLLM uses for those that a checkpoint lacks."""
    return {
        layer: Heads(*(torch.ones_like(scale_H) for scale_H in heads))
        for layer, heads in scales.items()
    }


def swapped(scales: HeadsByLayer) -> dict[int, Heads]:
    """The first two KV heads exchange their scales, and so do the q heads that read them."""

    def swap(scale_H: Tensor, num_kv_heads: int) -> Tensor:
        scale_KG = scale_H.view(num_kv_heads, -1)  # [K, G]: KV heads, q heads of each
        order_K = [1, 0, *range(2, num_kv_heads)]
        return scale_KG[order_K].flatten()

    return {
        layer: Heads(*(swap(scale_H, len(heads.k)) for scale_H in heads))
        for layer, heads in scales.items()
    }
