"""A `quantization_config` of config.json to be changed in place: its groups and its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def groups_of(quantization: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its config groups that are objects."""
    groups = quantization.get("config_groups")
    entries = groups.items() if isinstance(groups, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}


def attention_groups(quantization: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of q, k and v: they have activations and no weights."""
    return [
        entry
        for entry in groups_of(quantization).values()
        if entry.get("weights") is None and entry.get("input_activations") is not None
    ]


def update_cache(quantization: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Set fields of the cache's scheme, where there is one."""
    if isinstance(quantization.get("kv_cache_scheme"), dict):
        quantization["kv_cache_scheme"].update(fields)


def replace_cache(quantization: dict[str, Any], scheme: dict[str, Any] | None) -> None:
    """Set the cache's scheme; the same per layer stays where no group wants it per head."""
    folded = None if scheme is None else {**scheme, "strategy": "tensor"}
    found = quantization.get("kv_cache_scheme")
    inputs = [entry["input_activations"] for entry in attention_groups(quantization)]
    per_head = any(isinstance(i, dict) and i.get("strategy") == "attn_head" for i in inputs)
    if found is None or found != folded or per_head:
        quantization["kv_cache_scheme"] = scheme


def fold_heads(quantization: dict[str, Any]) -> None:
    """One scale per layer instead of one per head, in the cache and the attention groups."""
    update_cache(quantization, {"strategy": "tensor"})
    for entry in attention_groups(quantization):
        if isinstance(entry["input_activations"], dict):
            entry["input_activations"]["strategy"] = "tensor"
