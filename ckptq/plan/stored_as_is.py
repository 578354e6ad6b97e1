"""Scales for the KV cache of a checkpoint whose weights are quantized already and stay as they are.

Nothing is dequantized: every tensor is copied but the old cache scales, and the source's own
quantization config goes on to describe the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError
from ckptq.models.config_groups import stored_groups
from ckptq.models.modules import Layout
from ckptq.plan.attention import AttentionPlan, last_tensors
from ckptq.plan.unit import Unit

CACHE_SCALE = re.compile(r".*\.([qkv]_scale|[qkv]_zero_point|kv_scale)$")


def kept_config(ckpt: Checkpoint) -> Mapping[str, Any]:
    """The quantization config that goes on to hold for the weights, without its attention groups.

    PlanError for other methods than compressed-tensors: their configs have no place for a scheme
    of the cache.
    """
    config = ckpt.quantization_config or {}
    method = config.get("quant_method")
    if method != "compressed-tensors":
        raise PlanError(
            f"{ckpt.path}: is quantized with {method!r}, whose config has no place for calibrated "
            "cache scales; choose a scheme for weights and cache, which writes compressed-tensors"
        )
    groups = stored_groups(ckpt)
    return {
        **config,
        "config_groups": {name: g for name, g in groups.items() if g.get("weights") is not None},
    }


def copied_units(ckpt: Checkpoint, layout: Layout, attention: AttentionPlan) -> Iterator[Unit]:
    """Every tensor of the source as it is, and behind each attention module its new scales."""
    ends = last_tensors(ckpt, attention)
    for name, tensor in ckpt.tensors.items():
        if CACHE_SCALE.match(name):
            yield Unit(key=name, rule="dropped: calibrated anew")
        else:
            consumers = layout.consumed.get(name)
            rule = layout.others.get(name) or ("quantized already" if consumers else "copied")
            yield Unit(key=name, rule=rule, copies={name: tensor})
        if name in ends:
            module = ends[name]
            yield Unit(key=module, rule="calibrated", scales=attention.scales[module])
