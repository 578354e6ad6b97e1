"""The KV caches that `--kv-cache` offers, and where their scales come from.

Static FP8 rounds q as well, as FlashAttention 3 does with an FP8 cache; q's scale is the largest of
its KV head's group, as in vLLM's loader. The other caches leave q alone.

Shape letters: B batch, H heads of any kind, K KV heads, S positions, D head size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ckptq.calibrate.observers import scale_of
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import read_tensor
from ckptq.errors import UsageError
from ckptq.evaluate.largest import Largest
from ckptq.forward.linear_inputs import real_positions
from ckptq.kernels.token_head.kv_format import FORMATS, Rotation
from ckptq.models.attention import cache_scales
from ckptq.recipes.declared import declared

PLAIN = "bf16"
PER_TENSOR, PER_HEAD, SCALE_1 = "fp8-per-tensor", "fp8-per-head", "fp8-scale-1"
STATIC = (PER_TENSOR, PER_HEAD, SCALE_1)
DYNAMIC = tuple(name.replace("_", "-") for name in FORMATS)
UNROTATED, ROTATED = "-unrotated", "-rotated"
MODES = (PLAIN, *STATIC, *DYNAMIC)
"""Values of `--kv-cache`. Those per token and head may end in "-unrotated" or "-rotated", and all
but the first in "-skip-0-3": layers that stay in 16 bits."""
SKIP = re.compile(r"^(?P<cache>.+)-skip(?P<layers>(-\d+)+)$")

AttentionScales = Mapping[str, "Tensor"]
"""Scales of "q", "k" and "v" of one attention, [1] or one a head, as a checkpoint stores them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """How keys and values are stored between tokens."""

    mode: str
    rotation: Rotation | None = None
    """Instead of the format's own."""
    scales: Mapping[str, AttentionScales] | None = None
    """By attention module; None measures them on the text with the source."""
    query: bool = True
    """Whether q is rounded too with a static FP8 cache."""
    toward_zero: bool = False
    """Whether a static FP8 cache truncates instead of rounding."""
    origin: str = "-"
    """Where scales come from, for the table."""
    skipped: frozenset[int] = frozenset()
    """Layers whose cache stays in 16 bits."""

    @property
    def name(self) -> str:
        """Its name for `--kv-cache`."""
        suffixes = {None: "", Rotation.NONE: UNROTATED, Rotation.SIGNED: ROTATED}
        skip = "".join(f"-{layer}" for layer in sorted(self.skipped))
        return self.mode + suffixes[self.rotation] + (f"-skip{skip}" if skip else "")

    def in_layer(self, index: int) -> KVCache:
        """What one layer has."""
        return BF16 if index in self.skipped else self

    def mean_bits(self, head_dim: int, layers: int) -> float:
        """`bits`, averaged over so many layers of the same size. UsageError for a layer to skip
        that the model does not have."""
        if absent := [layer for layer in sorted(self.skipped) if layer >= layers]:
            raise UsageError(
                f"--kv-cache {self.name}: this model has layers 0 to {layers - 1}, no {absent[0]}"
            )
        share = len(self.skipped) / max(layers, 1)
        return share * BF16.bits(head_dim) + (1 - share) * self.bits(head_dim)

    def bits(self, head_dim: int) -> float:
        """Per cached value: its code, and its share of the scale and zero point per head.

        UsageError for a head size that the format does not pack.
        """
        if self.mode == PLAIN:
            return 16.0
        if self.mode in STATIC:
            return 8.0
        held = FORMATS[self.mode.replace("-", "_")]
        try:
            width = held.width(head_dim)
        except ValueError as error:
            raise UsageError(
                f"--kv-cache {self.name}: packs heads whose size is a multiple of 8; this model's "
                f"is {head_dim}"
            ) from error
        return 8 * (width + 4 + held.asymmetric) / head_dim

    @property
    def measures(self) -> bool:
        """Whether scales have to be measured on the source."""
        return self.mode in (PER_TENSOR, PER_HEAD) and self.scales is None


BF16 = KVCache(mode=PLAIN)


class Maxima:
    """Largest magnitude of q, k and v per head, by attention module, as the source runs."""

    def __init__(self) -> None:
        self.seen = Largest()

    def see(self, module: str, qkv: Mapping[str, Tensor], lengths: Sequence[int]) -> None:
        """Fold a batch in, [B, H, S, D] each; padding does not count."""
        for which, x_BHSD in qkv.items():
            x_HTD = x_BHSD.transpose(0, 1).flatten(1, 2)
            where = real_positions(lengths, x_BHSD.shape[2], x_BHSD.device)
            real_HTD = x_HTD if where is None else x_HTD.index_select(1, where)
            self.seen.see((module, which), real_HTD.abs().amax((1, 2)))

    def scales(self, module: str) -> dict[str, Tensor]:
        """amax / 448 per head in the dtype of q, k and v, as in calibration."""
        found = {which: self.seen.values.get((module, which)) for which in "qkv"}
        return {w: scale_of(a_H, a_H.dtype) for w, a_H in found.items() if a_H is not None}


def parse_cache(name: str, ckpt: Checkpoint | None) -> KVCache:
    """The cache for one value of `--kv-cache`, with scales from `ckpt` if it is given and has them.

    With scales per head, fp8-per-tensor takes the largest, as vLLM does on CPUs; scales
    per tensor are of no use to fp8-per-head.
    """
    if skip := SKIP.match(name):
        layers = frozenset(map(int, skip["layers"][1:].split("-")))
        return replace(parse_cache(skip["cache"], ckpt), skipped=layers)
    for suffix, rotation in ((UNROTATED, Rotation.NONE), (ROTATED, Rotation.SIGNED)):
        mode = name.removesuffix(suffix)
        if name.endswith(suffix) and mode in DYNAMIC:
            return KVCache(mode=mode, rotation=rotation, origin="per token and head")
    if name not in MODES:
        raise UsageError(
            f"--kv-cache {name!r}: expected {', '.join(MODES)}; those per token and head also with "
            f"{UNROTATED} or {ROTATED}; all with -skip-0-3 to keep layers in 16 bits"
        )
    if name in DYNAMIC:
        return KVCache(mode=name, origin="per token and head")
    if name == SCALE_1:
        return KVCache(mode=name, origin="1.0")
    if name == PLAIN:
        return BF16
    found = _stored(ckpt) if ckpt is not None else {}
    per_head = any(t.numel() > 1 for scales in found.values() for t in scales.values())
    if not found or (name == PER_HEAD and not per_head):
        return KVCache(mode=name, origin="this text")
    origin = "checkpoint" if (name == PER_HEAD) == per_head else "its largest head"
    return KVCache(mode=name, scales=found, origin=origin)


def declared_cache(ckpt: Checkpoint) -> KVCache:
    """An engine's default: FP8 if the config has a KV scheme."""
    scheme = declared(ckpt).kv_cache_scheme
    if scheme is None:
        return BF16
    mode = PER_HEAD if scheme.strategy == "attn_head" else PER_TENSOR
    found = _stored(ckpt)
    if not found:
        # engines start from 1.0 and say nothing where a checkpoint declares scales it lacks
        return KVCache(mode=SCALE_1, origin="1.0: the checkpoint lacks these scales")
    return KVCache(mode=mode, scales=found, origin="checkpoint")


def on_cpu(cache: KVCache, *, heads_apart: bool) -> KVCache:
    """A static FP8 cache as in vLLM's CPU backend: the largest head's scale, q in 16 bits, k
    and v truncated to E4M3 (measured for every bf16 value with vLLM 0.32).

    With `heads_apart`, each process has one head and its scale.
    """
    if cache.mode not in STATIC:
        return cache
    mode = PER_TENSOR if cache.mode == PER_HEAD and not heads_apart else cache.mode
    return replace(cache, mode=mode, query=False, toward_zero=True)


def _stored(ckpt: Checkpoint) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for (module, which), tensor in cache_scales(ckpt.tensors).items():
        found.setdefault(module, {})[which] = read_tensor(tensor)
    return found
