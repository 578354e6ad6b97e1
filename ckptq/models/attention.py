"""Attention in the decoder layers, from names and config: which modules cache heads of k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ckptq.models.family import LAYER

KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value", "c_attn", "W_pack")
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")
"""What multi-head latent attention has in the place of a k_proj."""

UNCACHED = ("linear_attention", "conv")
"""Types of layers that keep a state instead of keys and values; their projections may be called
like those of attention."""

AttentionKind = Literal["heads", "latent"]


def attention_kind(
    linear: str, layers: str, num_layers: int, text_config: Mapping[str, Any]
) -> AttentionKind | None:
    """What the module that owns this Linear caches, if the Linear tells: the one that makes keys.

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


def _keeps_a_state(text_config: Mapping[str, Any], index: int) -> bool:
    """`layer_types` of transformers' configs; Kimi-Linear's own counts its layers from 1."""
    types = text_config.get("layer_types")
    if isinstance(types, list) and index < len(types):
        return types[index] in UNCACHED
    kimi = text_config.get("linear_attn_config")
    kda = kimi.get("kda_layers") if isinstance(kimi, dict) else None
    return isinstance(kda, list) and index + 1 in kda
