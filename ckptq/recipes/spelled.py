"""A recipe as YAML in llm-compressor's dialect, from its groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from ckptq.recipes.scheme import Recipe

STAGE, MODIFIERS = "quantization_stage", "quantization_modifiers"
PLAIN, GPTQ, AUTOROUND = "QuantizationModifier", "GPTQModifier", "AutoRoundModifier"


def spelled(scheme: Recipe) -> str:
    """One stage with one modifier that quantizes."""
    groups = {
        group.name: {key: value for key, value in group.to_dict().items() if value is not None}
        for group in scheme.groups
    }
    kind, modifier = _modifier(scheme)
    modifier["config_groups"] = groups
    if scheme.ignore:
        modifier["ignore"] = list(scheme.ignore)
    if scheme.kv_cache_scheme is not None:
        modifier["kv_cache_scheme"] = scheme.kv_cache_scheme.to_dict()
    stages = {STAGE: {MODIFIERS: {kind: modifier}}}
    return yaml.safe_dump(stages, sort_keys=False)


def changed(recipe: Recipe, suffix: str = "", **fields: Any) -> Recipe:
    """The recipe with other fields, the suffix behind its name, and the text that stands for it."""
    made = replace(recipe, name=recipe.name + suffix, **fields)
    return replace(made, text=spelled(made))


def chooser_of(scheme: Recipe) -> str | None:
    """The modifier that chooses codes, or runs in llm-compressor; None where codes are nearest."""
    if scheme.handed_over:
        return scheme.handed_over[0]
    if scheme.tuning is not None:
        return AUTOROUND
    return None if scheme.gptq is None else GPTQ


def _modifier(scheme: Recipe) -> tuple[str, dict[str, Any]]:
    """Its class and own fields. GPTQ's `actorder` left out would be static; groups say it if it
    is."""
    if scheme.tuning is not None:
        return AUTOROUND, scheme.tuning.to_dict()
    if scheme.gptq is None:
        return PLAIN, {}
    plain = not any(g.weights is not None and g.weights.actorder for g in scheme.groups)
    return GPTQ, {**scheme.gptq.to_dict(), **({"actorder": None} if plain else {})}
