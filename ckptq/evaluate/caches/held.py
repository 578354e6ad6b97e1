"""Where the keys and values of a row are held while a layer runs: in pages, or only simulated.

Shape letters: B batch, H query heads, K KV heads, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ckptq.evaluate.caches.kv_cache import STATIC, KVCache, Maxima
from ckptq.evaluate.caches.paged import paged, unpaged
from ckptq.evaluate.caches.simulated import Scales, simulated
from ckptq.forward.tap import Qkv, Tap

if TYPE_CHECKING:
    from torch import Tensor

    from ckptq.forward.kernel_attention import Words


class Held:
    """A row's cache in one layer: taps for its batches. `note` gets what is simulated, and why."""

    def __init__(
        self,
        cache: KVCache,
        maxima: Maxima,
        on_disk: Callable[[str], str],
        *,
        in_pages: bool,
        note: Callable[[str], None],
    ) -> None:
        self._cache = cache
        self._scales = Scales(cache, maxima, on_disk)
        self._simulated = simulated(cache, self._scales)
        self._in_pages = in_pages
        self._note = note

    def tap(self, lengths: Sequence[int]) -> Tap:
        """For a batch with rows of so many real positions."""
        replace = self._paged if self._in_pages else None
        return Tap(lengths, self._simulated, replace=replace)

    def _paged(self, module: str, qkv: Qkv, asked: Words | None) -> Tensor | None:
        q_BHSD, k_BKSD, v_BKSD = qkv
        why = unpaged(self._cache, k_BKSD, v_BKSD)
        if asked is None or why is not None:
            own = "sinks, or a mask, that kernels do not know"
            self._note(f"cache simulated, not held in pages: {why or own}")
            return None
        static = self._cache.mode in STATIC
        scales = self._scales.of(module, q_BHSD, k_BKSD) if static else {}
        return paged(self._cache, scales, q_BHSD, k_BKSD, v_BKSD, asked)
