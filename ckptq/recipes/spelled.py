"""A recipe as YAML in llm-compressor's dialect, from its groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from ckptq.recipes.scheme import Recipe

STAGE, MODIFIERS = "quantization_stage", "quantization_modifiers"
PLAIN, GPTQ = "QuantizationModifier", "GPTQModifier"


def spelled(scheme: Recipe) -> str:
    """One stage with one modifier that quantizes."""
    groups = {
        group.name: {key: value for key, value in group.to_dict().items() if value is not None}
        for group in scheme.groups
    }
    modifier: dict[str, Any] = {} if scheme.gptq is None else _chosen(scheme)
    modifier["config_groups"] = groups
    if scheme.ignore:
        modifier["ignore"] = list(scheme.ignore)
    if scheme.kv_cache_scheme is not None:
        modifier["kv_cache_scheme"] = scheme.kv_cache_scheme.to_dict()
    stages = {STAGE: {MODIFIERS: {PLAIN if scheme.gptq is None else GPTQ: modifier}}}
    return yaml.safe_dump(stages, sort_keys=False)


def changed(recipe: Recipe, suffix: str = "", **fields: Any) -> Recipe:
    """The recipe with other fields, the suffix behind its name, and the text that stands for it."""
    made = replace(recipe, name=recipe.name + suffix, **fields)
    return replace(made, text=spelled(made))


def _chosen(scheme: Recipe) -> dict[str, Any]:
    """The modifier's own fields. `actorder` left out would be static; groups say it if it is."""
    assert scheme.gptq is not None
    plain = not any(g.weights is not None and g.weights.actorder for g in scheme.groups)
    return {**scheme.gptq.to_dict(), **({"actorder": None} if plain else {})}
