"""A recipe as YAML in llm-compressor's dialect, from its groups."""

from __future__ import annotations

from typing import Any

import yaml

from ckptq.recipes.scheme import Scheme


def spelled(scheme: Scheme) -> str:
    """One stage with one QuantizationModifier."""
    groups = {
        group.name: {key: value for key, value in group.to_dict().items() if value is not None}
        for group in scheme.groups
    }
    modifier: dict[str, Any] = {"config_groups": groups}
    if scheme.ignore:
        modifier["ignore"] = list(scheme.ignore)
    if scheme.kv_cache_scheme is not None:
        modifier["kv_cache_scheme"] = scheme.kv_cache_scheme.to_dict()
    stages = {"quantization_stage": {"quantization_modifiers": {"QuantizationModifier": modifier}}}
    return yaml.safe_dump(stages, sort_keys=False)
