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

VALUES = ("v_proj", "k_proj")
"""What makes the values: Gemma-4 has layers whose keys are their values."""

OUTPUTS = ("o_proj", "out_proj", "dense")

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


def heads_in(
    module: str, heads: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, int]:
    """(query heads, key/value heads) of one attention module; `heads` are those of the config.

    Gemma-4's global layers and MiMo's sliding ones have key/value heads of their own number, each
    config with names of its own. `shapes` of the Linears [out, in] tell: the output projection has
    columns for all query heads and v_proj rows for all key/value heads, of one size.
    """
    output = _first(module, OUTPUTS, shapes)
    values = _first(module, VALUES, shapes)
    if output is None or values is None or output[1] % heads[0]:
        return heads
    count, rest = divmod(values[0], output[1] // heads[0])
    return heads if rest or not count or heads[0] % count else (heads[0], count)


def by_side(heads: tuple[int, int]) -> dict[str, int]:
    """How many heads q, k and v have, and so scales of their own."""
    return {"q": heads[0], "k": heads[1], "v": heads[1]}


def _first(
    module: str, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...] | None:
    return next((shapes[n] for name in names if (n := f"{module}.{name}") in shapes), None)


def _keeps_a_state(text_config: Mapping[str, Any], index: int) -> bool:
    """`layer_types` of transformers' configs; Kimi-Linear's own counts its layers from 1."""
    types = text_config.get("layer_types")
    if isinstance(types, list) and index < len(types):
        return types[index] in UNCACHED
    kimi = text_config.get("linear_attn_config")
    kda = kimi.get("kda_layers") if isinstance(kimi, dict) else None
    return isinstance(kda, list) and index + 1 in kda
