"""Where the keys and values of a row are held while a layer runs: in pages, or only simulated.

Shape letters: B batch, H query heads, K KV heads, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ckptq.evaluate.caches.kv_cache import STATIC, KVCache, Maxima
from ckptq.evaluate.caches.simulated import Scales, simulated
from ckptq.forward.over_pages import over_static_fp8, over_tokens_and_heads
from ckptq.forward.tap import Asked, Qkv, Tap
from ckptq.kernels.token_head.kv_format import FORMATS, rotation_block


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

    def _paged(self, module: str, qkv: Qkv, asked: Asked) -> Tensor | None:
        q_BHSD, k_BKSD, v_BKSD = qkv
        why, words = unpaged(self._cache, k_BKSD, v_BKSD), asked()
        if words is None or why is not None:
            own = "sinks, or a mask, that kernels do not know"
            self._note(f"cache simulated, not held in pages: {why or own}")
            return None
        if self._cache.mode in STATIC:
            scales = self._scales.of(module, q_BHSD, k_BKSD)
            return over_static_fp8(qkv, scales, words, round_query=self._cache.query)
        fmt = FORMATS[self._cache.mode.replace("-", "_")]
        return over_tokens_and_heads(qkv, fmt, self._cache.rotation, words)


def unpaged(cache: KVCache, k_BKSD: Tensor, v_BKSD: Tensor) -> str | None:
    """Why such keys and values are not held in pages; None where they are."""
    if k_BKSD.shape != v_BKSD.shape:
        return f"values of {v_BKSD.shape[3]} beside keys of {k_BKSD.shape[3]}"
    if cache.toward_zero:
        return "a cache that truncates"
    if cache.mode not in STATIC and rotation_block(k_BKSD.shape[3]) < 8:
        return f"a head size of {k_BKSD.shape[3]}"
    return None
