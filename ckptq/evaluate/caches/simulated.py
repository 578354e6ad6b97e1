"""What a KV cache does to q, k and v, without a cache: rounded where they are, before attention.

So it is on a CPU, and on a GPU for attention that kernels do not know; `forward.over_pages`
is the cache.

Shape letters: B batch, H query heads, K KV heads, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ckptq.evaluate.caches.kv_cache import (
    PER_TENSOR,
    SCALE_1,
    STATIC,
    AttentionScales,
    KVCache,
    Maxima,
)
from ckptq.kernels.token_head.kv_format import FORMATS
from ckptq.kernels.token_head.reference import there_and_back
from ckptq.verify.attention.fp8_heads import in_fp8

See = Callable[[str, "Tensor", "Tensor", "Tensor"], None]
"""Gets (module name, q [B, H, S, D], k and v [B, K, S, D]) on their way into attention."""


class Scales:
    """The scales of a static cache, module by module: those at a module's first batch, on its
    device."""

    def __init__(self, cache: KVCache, maxima: Maxima, on_disk: Callable[[str], str]) -> None:
        self._cache, self._maxima, self._on_disk = cache, maxima, on_disk
        self._known: dict[str, Mapping[str, Tensor]] = {}

    def of(self, module: str, q_BHSD: Tensor, k_BKSD: Tensor) -> Mapping[str, Tensor]:
        """Of "q", "k" and "v", one a head."""
        if module not in self._known:
            name, cache = self._on_disk(module), self._cache
            stored = (cache.scales or {}).get(name, {})
            found = self._maxima.scales(name) if cache.measures else stored
            scales = effective(cache.mode, found, q_BHSD.shape[1], k_BKSD.shape[1])
            self._known[module] = {w: scale.to(q_BHSD.device) for w, scale in scales.items()}
        return self._known[module]


def simulated(cache: KVCache, scales: Scales) -> See:
    """Replaces q, k and v by what attention would read from such a cache."""

    def static(module: str, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> None:
        known = scales.of(module, q_BHSD, k_BKSD)
        for which, x_BHSD in {"q": q_BHSD, "k": k_BKSD, "v": v_BKSD}.items():
            if which != "q" or cache.query:
                x_BHSD.copy_(fp8_of(x_BHSD, known[which], cache))

    def dynamic(module: str, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> None:
        for x_BKSD in (k_BKSD, v_BKSD):
            x_BKSD.copy_(_dynamic(x_BKSD, cache))

    return static if cache.mode in STATIC else dynamic


def fp8_of(x_BHSD: Tensor, scale_H: Tensor, cache: KVCache) -> Tensor:
    """What a static FP8 cache returns."""
    return (cut_toward_zero if cache.toward_zero else _static)(x_BHSD, scale_H)


def effective(mode: str, scales: AttentionScales, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Scale of every head of q, k and v, [heads] and twice [kv_heads], as vLLM uses them.

    A missing scale is 1.0, as in vLLM.
    """
    made = {}
    for which in ("q", "k", "v"):
        scale_H = scales.get(which, torch.ones(1)).float().flatten()
        if mode == SCALE_1:
            scale_H = torch.ones(1)
        elif mode == PER_TENSOR:
            scale_H = scale_H.amax(0, keepdim=True)
        count = heads if which == "q" else kv_heads
        scale_H = scale_H.expand(count) if scale_H.numel() == 1 else scale_H
        if which == "q":
            group = heads // kv_heads
            scale_H = scale_H.view(kv_heads, group).amax(1).repeat_interleave(group)
        made[which] = scale_H
    return made


def cut_toward_zero(x_BHSD: Tensor, scale_H: Tensor) -> Tensor:
    """To E4M3 and back, truncated."""
    scale_H11 = scale_H.view(-1, 1, 1).to(x_BHSD.device)
    y_BHSD = (x_BHSD.float() / scale_H11).clamp(-448, 448)
    nearest = y_BHSD.to(torch.float8_e4m3fn)
    # magnitudes of codes are in the order of their bits
    larger = (nearest.float().abs() > y_BHSD.abs()).to(torch.uint8)
    code_BHSD = (nearest.view(torch.uint8) - larger).view(torch.float8_e4m3fn)
    return (code_BHSD.float() * scale_H11).to(x_BHSD.dtype)


def _static(x_BHSD: Tensor, scale_H: Tensor) -> Tensor:
    return in_fp8(x_BHSD, scale_H.view(-1, 1, 1).to(x_BHSD.device)).to(x_BHSD.dtype)


def _dynamic(x_BHSD: Tensor, cache: KVCache) -> Tensor:
    return there_and_back(x_BHSD, FORMATS[cache.mode.replace("-", "_")], cache.rotation)
