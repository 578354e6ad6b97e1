"""How many heads attention has, as transformers' config classes and vLLM count them.

Families store it differently: under other names (transformers' `attribute_map`), with
flags (Falcon's `multi_query`), in an object (`attn_config`), or layer by layer (OpenELM,
Nemotron-NAS). The shapes of the projections show where a layer differs from the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptq.errors import PlanError

QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_query_heads")
"""Names in configs: transformers' own, its aliases, OpenELM's."""

ALIASES = {"gpt_neo": ("num_heads",), "xglm": ("attention_heads",)}
"""Aliases that mean something else in other families."""

KEY_VALUE_HEADS = (
    *("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num"),
    *("num_attention_groups", "num_key_value_heads_per_layer"),
)
"""In the order in which vLLM asks (`ModelArchConfigConvertorBase.get_total_num_kv_heads`); the last
is DeciLM's."""

HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model")

MULTI_QUERY = ("falcon", "RefinedWeb", "RefinedWebModel", "gpt_bigcode")
"""Types whose `multi_query` (default true) means one key/value head for all."""

FUSED = ("qkv_proj", "query_key_value", "W_pack", "Wqkv", "wqkv", "c_attn", "qkv")
"""Projections whose rows are those of q, k and v."""

VALUES = ("v_proj", "k_proj")
"""What makes the values: Gemma-4 has layers whose keys are their values."""

OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")

Heads = tuple[int, int]
"""(query heads, key/value heads)."""


def config_heads(config: Mapping[str, Any]) -> Heads | None:
    """Those of the text config, or of its first layer that has any; None for a model without
    attention. Engines take them for all layers."""
    layers = [len(value) for value in config.values() if isinstance(value, list)]
    found = (layer_heads(config, index) for index in range(max([1, *layers])))
    return next((heads for heads in found if heads is not None), None)


def config_head_dim(config: Mapping[str, Any], heads: int) -> int:
    """Values of one query or key of one head, as transformers reads it from a text config.

    PlanError for anything but a number.
    """
    for key in ("head_dim", *HIDDEN_SIZES):
        share = 1 if key == "head_dim" else heads
        found = config.get(key)
        if found is None:
            continue
        if type(found) is not int or found < share:
            raise PlanError(
                f"config.json: {key} is {found!r}; expected a whole number, at least {share}"
            )
        return found // share
    raise PlanError("config.json: head_dim and hidden_size are missing, so the heads are unknown")


def layer_heads(config: Mapping[str, Any], index: int) -> Heads | None:
    """Those of one decoder layer, as the text config says; None where it has no attention."""
    kv = _key_value_heads(config, index)
    names = (*QUERY_HEADS, *ALIASES.get(str(config.get("model_type")), ()))
    query = _first(config, names, index)
    if query is None and kv and config.get("model_type") == "jetmoe":
        query = kv * (_number(config.get("num_experts_per_tok")) or 1)
    if query is None or kv == 0:
        return None
    block = _block_attention(config, index)
    if block is not None:
        grouped = _number(block.get("n_heads_in_group"))
        return None if block.get("no_op") or grouped is None else (query, query // grouped)
    if config.get("model_type") in MULTI_QUERY and _is_multi_query(config):
        return query, 1
    return query, kv or query


def heads_in(module: str, heads: Heads, shapes: Mapping[str, tuple[int, ...]]) -> Heads:
    """Those of one attention module; `heads` are what the config says of its layer.

    Gemma-4's global layers and MiMo's sliding ones have key/value heads of their own number, each
    config with names of its own. `shapes` of the Linears [out, in] tell: the output projection has
    columns for all query heads, and v_proj, or the fused projection, rows for all key/value heads,
    of one size.
    """
    output, values = _shape(module, OUTPUTS, shapes), _shape(module, VALUES, shapes)
    fused = _shape(module, FUSED, shapes)
    if output is None or output[1] % heads[0]:
        return heads
    size = output[1] // heads[0]
    if values is not None:
        count, rest = divmod(values[0], size)
    elif fused is not None:
        count, rest = divmod(fused[0] - output[1], 2 * size)
    else:
        return heads
    return heads if rest or count <= 0 or heads[0] % count else (heads[0], count)


def by_side(heads: Heads) -> dict[str, int]:
    """How many heads q, k and v have, and so scales of their own."""
    return {"q": heads[0], "k": heads[1], "v": heads[1]}


def _key_value_heads(config: Mapping[str, Any], index: int) -> int | None:
    """0 for a layer without attention, None where the config does not say."""
    attention = config.get("attn_config")
    if isinstance(attention, Mapping) and (found := _number(attention.get("kv_n_heads"))):
        return found
    for key in KEY_VALUE_HEADS:
        value = config.get(key)
        if isinstance(value, list) and index < len(value) and value[index] in (0, None):
            return 0
    return _first(config, KEY_VALUE_HEADS, index)


def _is_multi_query(config: Mapping[str, Any]) -> bool:
    """Falcon's newer architecture names its number of key/value heads differently."""
    return config.get("multi_query") is not False and not config.get("new_decoder_architecture")


def _block_attention(config: Mapping[str, Any], index: int) -> Mapping[str, Any] | None:
    """Nemotron-NAS: what `block_configs` says of a layer's attention."""
    blocks = config.get("block_configs")
    block = blocks[index] if isinstance(blocks, list) and index < len(blocks) else None
    attention = block.get("attention") if isinstance(block, Mapping) else None
    return attention if isinstance(attention, Mapping) else None


def _first(config: Mapping[str, Any], keys: tuple[str, ...], index: int) -> int | None:
    found = (_number(config.get(key), index) for key in keys)
    return next((number for number in found if number is not None), None)


def _number(value: object, index: int = 0) -> int | None:
    """A positive whole number, or the one of a layer."""
    if isinstance(value, list):
        value = value[index] if index < len(value) else None
    return value if type(value) is int and value > 0 else None


def _shape(
    module: str, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...] | None:
    return next((shapes[n] for name in names if (n := f"{module}.{name}") in shapes), None)
