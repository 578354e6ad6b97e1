"""`--group-size`: another number of columns under one scale than the recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from ckptq.errors import UsageError
from ckptq.recipes.load import Args, Group, Recipe

ROW = -1
"""compressed-tensors' size of a group that is the whole row."""

SIZES = (128, 64, 32, ROW)
"""What vLLM 0.32 serves: Marlin's `MARLIN_SUPPORTED_GROUP_SIZES`, for experts too."""


def sizes_of(group: Group) -> tuple[int, ...]:
    """The sizes that vLLM serves of a group of Linears; none where the recipe has no choice.

    Integers have groups of any size, but beside FP8 activations of 128 alone
    (`CompressedTensorsW4A8Fp8`); NVFP4 and the MX formats have their own.
    """
    weights, inputs = group.weights or {}, group.input_activations or {}
    if weights.get("strategy") != "group" or weights.get("type", "int") != "int":
        return ()
    return (128,) if inputs.get("type") == "float" else SIZES


def with_group_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe with `size` columns under a scale wherever its groups have a size to choose.

    -1 is one scale a row. UsageError for a size that vLLM does not serve, and for a recipe without
    such groups. The name says the size: "w4a16-g64", "w4a16-channel".
    """
    if size not in SIZES:
        raise UsageError(
            f"--group-size {size}: wanted 32, 64 or 128, which vLLM's kernels take, or -1 for one "
            "scale a row"
        )
    if recipe.handed_over:
        raise UsageError(
            f"recipe {recipe.name!r} runs in llm-compressor, as it is written; write group_size "
            "there instead of --group-size"
        )
    if not any(map(sizes_of, recipe.groups)):
        raise UsageError(
            f"--group-size {size}: recipe {recipe.name!r} has no groups of integers; its scales "
            f"are {_scales(recipe)}"
        )
    groups = tuple(_resized(g, size) if sizes_of(g) else g for g in recipe.groups)
    if groups == recipe.groups:
        return recipe
    name = f"{recipe.name}-{'channel' if size == ROW else f'g{size}'}"
    made = replace(recipe, name=name, groups=groups)
    return replace(made, text=_spelled(made))


def _resized(group: Group, size: int) -> Group:
    if size not in sizes_of(group):
        raise UsageError(
            f"--group-size {size}: group {group.name!r} has FP8 activations, beside which vLLM "
            "serves groups of 128 only"
        )
    weights = {k: v for k, v in (group.weights or {}).items() if k != "group_size"}
    changed: Args = {"strategy": "channel"} if size == ROW else {"group_size": size}
    return replace(group, weights={**weights, **changed})


def _scales(recipe: Recipe) -> str:
    """What shares a scale, of each group of Linears."""
    found = [g.weights for g in recipe.groups if g.weights is not None]
    words = {
        f"one for {w['group_size']} columns, which its format fixes"
        if w.get("group_size")
        else f"one for a {w.get('strategy', 'tensor')}"
        for w in found
    }
    return " and ".join(sorted(words)) or "of attention alone"


def _spelled(recipe: Recipe) -> str:
    """The recipe as YAML in llm-compressor's dialect, from its groups."""
    modifier: dict[str, Any] = {"config_groups": {g.name: _fields(g) for g in recipe.groups}}
    if recipe.ignore:
        modifier["ignore"] = list(recipe.ignore)
    if recipe.kv_cache_scheme is not None:
        modifier["kv_cache_scheme"] = dict(recipe.kv_cache_scheme)
    stages = {"quantization_stage": {"quantization_modifiers": {"QuantizationModifier": modifier}}}
    return yaml.safe_dump(stages, sort_keys=False)


def _fields(group: Group) -> dict[str, Any]:
    fields: Mapping[str, Any] = {
        "targets": list(group.targets),
        "format": group.format,
        "weights": dict(group.weights) if group.weights is not None else None,
        "input_activations": dict(group.input_activations) if group.input_activations else None,
    }
    return {key: value for key, value in fields.items() if value is not None}
