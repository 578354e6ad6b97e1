"""Attention in the decoder layers, from names and config: which modules cache k and v heads, and
which read another layer's cache."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from ckptq.checkpoint.header import StoredTensor
from ckptq.models.family import LAYER
from ckptq.models.heads import FUSED

KEY_PROJECTIONS = ("k_proj", "kv_proj", *FUSED)
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")
"""What multi-head latent attention has instead of k_proj."""

LATENT_COUNTS = {"k": 1, "v": 1}
"""Scales of its one row for all heads, whose latent is read as k and as v. Both are the same."""

UNCACHED = ("linear_attention", "conv")
"""Layer types that keep a state instead of keys and values, although their projections may be named
like those of attention."""

CACHE_SCALE = re.compile(r"^(?P<module>.+?)(\.[qkv]_proj)?\.(?P<which>[qkv])_scale$")
"""Also where ModelOpt stores it: beside a projection's weight."""

OF_CACHE = re.compile(r".*\.([qkv]_scale|[qkv]_zero_point|kv_scale)$")
"""Every tensor that only a quantized cache uses."""

AttentionKind = Literal["heads", "latent"]


def cache_scales(tensors: Mapping[str, StoredTensor]) -> dict[tuple[str, str], StoredTensor]:
    """(attention module, "q" | "k" | "v") -> its scale."""
    found = ((CACHE_SCALE.match(name), tensor) for name, tensor in tensors.items())
    return {(m["module"], m["which"]): tensor for m, tensor in found if m is not None}


def attention_kind(
    linear: str, layers: str, num_layers: int, text_config: Mapping[str, Any]
) -> AttentionKind | None:
    """What the attention module of this Linear caches, if this Linear computes the keys.

    `layers` and `num_layers` are name and length of the list of decoder layers.
    """
    match = LAYER.match(linear)
    if not match or match["prefix"] != layers or int(match["index"]) >= num_layers:
        return None
    projection = linear.rpartition(".")[2]
    if projection in LATENT:
        return "latent"
    cached = not _keeps_a_state(text_config, int(match["index"]))
    return "heads" if projection in KEY_PROJECTIONS and cached else None


def layer_index(module: str) -> int:
    """Of a module inside the decoder layers."""
    match = LAYER.match(module + ".")
    assert match, f"{module} is in no layer"
    return int(match["index"])


def cache_owners(
    modules: Collection[str], parents: Collection[str], num_layers: int, config: Mapping[str, Any]
) -> dict[str, str]:
    """Attention module that reads another one's cache -> that one. Gemma-3n and the small Gemma-4.

    `modules` are those that make keys, `parents` all modules that hold Linears: the last
    `num_kv_shared_layers` layers use the cache of the last layer before them of the same type, and
    may have no k_proj at all.
    """
    by_layer = {layer_index(module): module for module in modules}
    found = {}
    for index, target in _shared_layers(config, num_layers).items():
        owner = by_layer.get(target)
        if owner is None:
            continue
        module = _in_layer(owner, index)
        if module in parents:
            found[module] = owner
    return found


def _in_layer(module: str, index: int) -> str:
    match = LAYER.match(module + ".")
    assert match, f"{module} is in no layer"
    return f"{module[: match.start('index')]}{index}{module[match.end('index') :]}"


def _shared_layers(config: Mapping[str, Any], num_layers: int) -> dict[int, int]:
    """Layer -> the one whose cache it reads, as transformers' modeling files have it."""
    count, types = config.get("num_kv_shared_layers"), config.get("layer_types")
    if type(count) is not int or not 0 < count < num_layers:
        return {}
    if not isinstance(types, list) or len(types) < num_layers:
        types = [None] * num_layers
    first = num_layers - count
    last = {kind: index for index, kind in enumerate(types[:first])}
    return {i: last[types[i]] for i in range(first, num_layers) if types[i] in last}


def _keeps_a_state(text_config: Mapping[str, Any], index: int) -> bool:
    """`layer_types` of transformers' configs; Kimi-Linear's own counts its layers from 1."""
    types = text_config.get("layer_types")
    if isinstance(types, list) and index < len(types):
        return types[index] in UNCACHED
    kimi = text_config.get("linear_attn_config")
    kda = kimi.get("kda_layers") if isinstance(kimi, dict) else None
    return isinstance(kda, list) and index + 1 in kda
