"""Which layers' KV cache may be quantized, in which of the formats that vLLM serves.

vLLM 0.32 holds the caches of all layers in one format, but for those that a flag keeps in 16 bits
(`--kv-cache-dtype-skip-layers`): so there is one format to choose, and the layers to skip. FP8 with
calibrated scales is declared by the checkpoint; formats with a scale for each token and head are
asked for when serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptq.checkpoint.open import Checkpoint
from ckptq.engines.vllm import TOKEN_HEAD_CACHES
from ckptq.errors import UsageError
from ckptq.evaluate.caches.kv_cache import BF16, PER_HEAD, PER_TENSOR, KVCache, parse_cache
from ckptq.models.attention import layer_index
from ckptq.models.heads import config_head_dim, config_heads
from ckptq.models.modules import Layout, read_layout
from ckptq.plan.make import make_plan
from ckptq.recipes.args import Args
from ckptq.recipes.load import load_scheme
from ckptq.search.result import CachePoint, ChosenCache
from ckptq.search.solve import least

STATIC = {PER_TENSOR: "kv-fp8-per-tensor", PER_HEAD: "kv-fp8-per-head"}
"""Cache -> the recipe that has it."""
CACHES = (*STATIC, *(name.replace("_", "-") for name in TOKEN_HEAD_CACHES))
"""In any of which vLLM can hold a cache."""
STEPS = 1 << 40
"""Losses are whole numbers of this part of the largest sum of them."""

CacheLosses = Mapping[str, Mapping[int, float]]
"""Cache -> layer -> loss with this layer's cache alone in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caches:
    """What there is to choose for one checkpoint."""

    values: Mapping[int, int]
    """Layer -> what it caches of a token, in values."""
    bits: Mapping[str, float]
    """Cache -> stored bits a value."""

    def check(self, bits: float) -> None:
        """UsageError where no format is within so many bits, or none is needed."""
        if bits >= BF16.bits(1):
            raise UsageError(f"--kv-bits {bits:g}: the cache has 16; leave the option out")
        if not bits >= min(self.bits.values()):  # NaN too
            each = ", ".join(f"{name} {held:g}" for name, held in self.bits.items())
            raise UsageError(f"--kv-bits {bits:g}: no cache is that small: {each}")

    def choose(self, losses: CacheLosses, bits: float) -> ChosenCache:
        """Format and layers to skip with the least sum of losses, within so many bits a value on
        average."""
        found = [each for cache in self.bits for each in self._within(cache, losses[cache], bits)]
        cache, skipped, point = min(found, key=lambda each: (each[2].loss, each[2].bits))
        return ChosenCache(
            cache=cache,
            skipped=skipped,
            point=point,
            uniform=tuple(self._point(c, losses[c], ()) for c in self.bits),
            flags=_flags(cache, skipped),
        )

    def _within(
        self, cache: str, losses: Mapping[int, float], bits: float
    ) -> Iterator[tuple[str, tuple[int, ...], CachePoint]]:
        sizes = [[round(n * self.bits[cache]), 16 * n] for n in self.values.values()]
        step = sum(losses.values()) / STEPS or 1.0
        costs = [[round(losses[layer] / step), 0] for layer in self.values]
        chosen = least(costs, sizes, int(bits * sum(self.values.values())))
        if chosen is not None:
            skipped = tuple(layer for layer, kept in zip(self.values, chosen, strict=True) if kept)
            yield cache, skipped, self._point(cache, losses, skipped)

    def _point(self, cache: str, losses: Mapping[int, float], skipped: Sequence[int]) -> CachePoint:
        total = sum(self.values.values())
        kept = sum(self.values[layer] for layer in skipped)
        return CachePoint(
            name=KVCache(mode=cache, skipped=frozenset(skipped)).name,
            bits=(16 * kept + self.bits[cache] * (total - kept)) / total,
            loss=sum(loss for layer, loss in losses.items() if layer not in skipped),
        )


def find_caches(ckpt: Checkpoint, names: Sequence[str]) -> Caches:
    """What each layer caches. Headers only. UsageError for a cache that vLLM does not serve, or
    latent attention does not have; PlanError for a model without attention."""
    if odd := [name for name in names if name not in CACHES]:
        raise UsageError(f"--kv-caches {odd[0]!r}: choose from {', '.join(CACHES)}")
    plan = make_plan(ckpt, load_scheme(STATIC[PER_TENSOR]))
    assert plan.attention is not None
    if plan.attention.latent and set(names) != {PER_TENSOR}:
        raise UsageError(
            f"--kv-caches: latent attention has one scale a layer; use --kv-caches {PER_TENSOR}"
        )
    if PER_HEAD in names:
        told = _per_head_told(ckpt)
        names = [name for name in names if not told or name != PER_HEAD]
    heads, _ = config_heads(ckpt.text_config) or (1, 1)
    size, layout = config_head_dim(ckpt.text_config, heads), read_layout(ckpt)
    return Caches(
        values={layer_index(m): _values(ckpt, layout, m, size) for m in plan.attention.scales},
        bits={name: parse_cache(name, None).bits(size) for name in names},
    )


def cache_scheme(cache: str) -> Args | None:
    """What a recipe says of it; None for a format that is asked for when serving."""
    return load_scheme(STATIC[cache]).attention if cache in STATIC else None


def _per_head_told(ckpt: Checkpoint) -> str | None:
    """Why vLLM would load no scales per head, if it would not."""
    attention = make_plan(ckpt, load_scheme(STATIC[PER_HEAD])).attention
    return attention.told if attention is not None else None


def _values(ckpt: Checkpoint, layout: Layout, module: str, size: int) -> int:
    """Keys and values of a token: rows of the projections, or what the config says."""
    rows = [
        layout.linears[name].weight.spec.shape[0]
        for name in (f"{module}.k_proj", f"{module}.v_proj")
        if name in layout.linears
    ]
    heads = config_heads(ckpt.text_config) or (1, 1)
    return sum(rows) if len(rows) == 2 else 2 * size * heads[1]


def _flags(cache: str, skipped: Sequence[int]) -> str:
    """Of `vllm serve`."""
    dtype = "" if cache in STATIC else f"--kv-cache-dtype {cache.replace('-', '_')}"
    layers = " ".join(map(str, skipped))
    skip = f"--kv-cache-dtype-skip-layers {layers}" if layers else ""
    return f"{dtype} {skip}".strip()
