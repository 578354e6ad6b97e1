"""The FP8 cache of latent attention, simulated: its rows are rounded where keys and values are
computed of them.

An engine reads what a prompt itself computed unrounded, and rounds a query of its own, with
kv_b_proj moved to it; here everything is read from the cache, and no query is rounded.

Shape letters: B batch, S positions, R size of a part of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ckptq.errors import UsageError
from ckptq.evaluate.caches.kv_cache import PER_TENSOR, SCALE_1, KVCache, Maxima
from ckptq.evaluate.caches.simulated import fp8_of
from ckptq.forward.latent import Latents
from ckptq.forward.tap import Tap, tapped


class LatentRows:
    """A row's cache in one layer with latent attention."""

    def __init__(self, cache: KVCache, maxima: Maxima, on_disk: Callable[[str], str]) -> None:
        """UsageError for a cache that latent attention does not have."""
        if cache.mode not in (PER_TENSOR, SCALE_1):
            raise UsageError(
                f"--kv-cache {cache.name}: latent attention caches one row for all heads, with one "
                f"scale a layer; use {PER_TENSOR} or {SCALE_1}"
            )
        self._cache, self._maxima, self._on_disk = cache, maxima, on_disk

    @contextmanager
    def held(
        self, latents: Latents, layer: nn.Module, name: str, lengths: Sequence[int]
    ) -> Iterator[None]:
        """The context in which the layer, called `name`, reads its rows from such a cache."""

        def see(module: str, _q: Tensor, k_BHSD: Tensor, _v: Tensor) -> None:
            part = latents.positions(module, k_BHSD)
            part.copy_(self._rounded(module, part))

        with latents.watched(self._rounded), tapped(layer, name, Tap(lengths, see)):
            yield

    def _rounded(self, module: str, part: Tensor) -> Tensor:
        scale = self._scale(self._on_disk(module)).to(part.device)
        return fp8_of(part.reshape(1, 1, -1, part.shape[-1]), scale, self._cache).view_as(part)

    def _scale(self, module: str) -> Tensor:
        """k's, [1]: engines write and read rows with it. A missing one is 1.0, as in vLLM."""
        if self._cache.mode == SCALE_1:
            return torch.ones(1)
        if self._cache.measures:
            return self._maxima.scales(module)["k"].float()
        stored = (self._cache.scales or {}).get(module, {})
        return stored.get("k", torch.ones(1)).float().reshape(1)
