"""Scales for the KV cache of a checkpoint whose weights are quantized already and stay as they are.

Nothing is dequantized: every tensor except the old cache scales is copied, and the source's
quantization config still describes the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError
from ckptq.models.attention import OF_CACHE
from ckptq.models.encoded import Encoded
from ckptq.models.modules import Layout
from ckptq.models.quantized.kept_numbers import looked_at
from ckptq.plan.attention import AttentionPlan, last_tensors
from ckptq.plan.unit import Unit
from ckptq.recipes.declared import Declared, declared


def kept_config(ckpt: Checkpoint) -> Declared:
    """The quantization config that still describes the weights.

    PlanError for methods other than compressed-tensors: their configs cannot describe a quantized
    cache.
    """
    said = declared(ckpt)
    if said.method != "compressed-tensors":
        raise PlanError(
            f"{ckpt.path}: quantized with {said.method!r}, whose config cannot hold calibrated "
            "cache scales; scheme 'repack' first writes the same weights as compressed-tensors"
        )
    return said


def copied_units(ckpt: Checkpoint, layout: Layout, attention: AttentionPlan) -> Iterator[Unit]:
    """Every tensor of the source as it is, and behind each attention module its new scales."""
    ends = last_tensors(ckpt, attention)
    for name, tensor in ckpt.tensors.items():
        if OF_CACHE.match(name):
            yield Unit(key=name, rule="dropped: calibrated anew")
        else:
            consumers = layout.consumed.get(name)
            rule = layout.others.get(name) or ("quantized already" if consumers else "copied")
            copies = {name: tensor}
            linear = layout.linears.get(name.rpartition(".")[0])
            weight = linear.weight if linear is not None else None
            kept = looked_at(copies, weight.scheme) if isinstance(weight, Encoded) else {}
            yield Unit(key=name, rule=rule, copies=copies, kept=kept)
        if name in ends:
            module = ends[name]
            yield Unit(key=module, rule="calibrated", scales=attention.scales[module])
