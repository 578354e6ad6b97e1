"""The scheme that a checkpoint's config.json declares, and what is written into one.

Most commands use `declared`, which raises on invalid fields; `ckptq verify` gives `read_declared` a
`Problem` that turns them into findings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import SourceError
from ckptq.recipes.args import Args, Problem, pair
from ckptq.recipes.scheme import Group, Scheme, read_groups, read_strings


@dataclass(frozen=True, kw_only=True)
class Declared(Scheme):
    """A quantization_config, as far as it can be read."""

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """As it stands in config.json."""

    @property
    def present(self) -> bool:
        return bool(self.config)

    @property
    def method(self) -> object:
        return self.config.get("quant_method")

    @property
    def is_fp8(self) -> bool:
        """Whether it is FP8 as DeepSeek and Mistral ship it."""
        return self.method == "fp8" and "config_groups" not in self.config

    @property
    def scale_format(self) -> object:
        """What FP8 sources call the format of their scales."""
        return self.config.get("scale_fmt")

    @property
    def kv_strategy(self) -> str | None:
        """ "tensor" or "attn_head"; None where no KV-cache scheme says so."""
        said = self.kv_cache_scheme.said("strategy") if self.kv_cache_scheme is not None else None
        return said if said in ("tensor", "attn_head") and isinstance(said, str) else None

    @property
    def keeps_fp8_cache(self) -> bool:
        """Whether engines keep the KV cache of a ModelOpt checkpoint in FP8."""
        own = self.config.get("quantization")
        if isinstance(own, Mapping):
            return str(own.get("kv_cache_quant_algo")).upper() == "FP8"
        cache = self.kv_cache_scheme
        return cache is not None and (cache.type, cache.num_bits) == ("float", 8)

    @property
    def has_attention_group(self) -> bool:
        return any(group.is_attention for group in self.groups)

    def with_cache(self, groups: Mapping[str, Any], cache: Any) -> dict[str, Any]:
        """The config for weights that stay as stored, with new attention groups and cache
        scheme."""
        own = self.config.get("config_groups") or {}
        kept = {g.name: own[g.name] for g in self.groups if g.weights is not None}
        return {**self.config, "config_groups": {**kept, **groups}, "kv_cache_scheme": cache}


def declared(ckpt: Checkpoint) -> Declared:
    """SourceError names an invalid field. Empty without a config."""

    def refuse(name: str, found: object, wanted: str) -> None:
        raise SourceError(
            f"{ckpt.path / CONFIG}: quantization_config.{name} is {found!r}, expected {wanted}"
        )

    return read_declared(ckpt, refuse)


def read_declared(ckpt: Checkpoint, problem: Problem) -> Declared:
    """What can be read; the rest goes to `problem`."""
    config = ckpt.quantization_config or {}
    if Declared(config=config).is_fp8:
        return Declared(config=config, groups=(_fp8(config, problem),))
    groups, kv = config.get("config_groups") or {}, config.get("kv_cache_scheme")
    if not isinstance(groups, Mapping):
        problem("config_groups", groups, "an object")
        groups = {}
    overall = config.get("format")
    ignore = config.get("ignore")
    return Declared(
        config=config,
        groups=tuple(read_groups(groups, None if overall is None else str(overall), problem)),
        ignore=() if ignore is None else read_strings(ignore, "ignore", problem),
        kv_cache_scheme=None if kv is None else Args.read(kv, "kv_cache_scheme", problem),
    )


def _fp8(config: Mapping[str, Any], problem: Problem) -> Group:
    """Weights in blocks or per tensor; inputs in groups of the blocks' columns, or per token."""
    found, block = config.get("weight_block_size"), None
    if found:
        try:
            block = pair(found)
        except ValueError:
            problem("weight_block_size", found, "two whole numbers")
    if block:
        inputs = Args(type="float", dynamic=True, strategy="group", group_size=block[1])
    else:
        static = config.get("activation_scheme") == "static"
        inputs = Args(type="float", dynamic=not static, strategy="tensor" if static else "token")
    return Group(
        name="fp8",
        targets=("Linear",),
        weights=Args(type="float", strategy="block" if block else "tensor", block_structure=block),
        input_activations=inputs,
        format="float-quantized",
    )
