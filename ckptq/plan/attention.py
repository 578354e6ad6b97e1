"""Which attention layers get q/k/v scales, and of what shape.

Shapes as llm-compressor writes them: [1] per tensor; per head [Hq, 1, 1] for q, [Hkv, 1, 1] for k
and v. The dtype is that of the attention module's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptq.checkpoint.open import Checkpoint
from ckptq.engines.vllm import kv_scheme_faults
from ckptq.errors import PlanError
from ckptq.models.attention import attention_kind, by_side, heads_in
from ckptq.models.modules import Layout, num_attention_heads
from ckptq.recipes.load import Args
from ckptq.spec import TensorSpec

KV_DEFAULTS: Args = {"symmetric": True, "dynamic": False, "strategy": "tensor"}
"""What llm-compressor's recipes mean where they leave it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """The q/k/v scales that calibration has to deliver."""

    strategy: Literal["tensor", "attn_head"]
    observer: str
    observer_arguments: Mapping[str, Any]
    scales: Mapping[str, Mapping[str, TensorSpec]]
    """Attention module -> full tensor name -> spec."""


def plan_attention(ckpt: Checkpoint, layout: Layout, args: Args) -> AttentionPlan:
    """Decide the scales for every decoder layer that has attention heads; PlanError if none has."""
    _check_args(args)
    heads = num_attention_heads(ckpt.text_config)
    projections = _key_projections(layout, ckpt.text_config)
    if heads is None or not projections:
        raise PlanError(
            f"{ckpt.path}: KV-cache scales are asked for, but this model has no attention heads: "
            f"num_attention_heads is {ckpt.text_config.get('num_attention_heads')}, "
            f"{len(projections)} layers have a k_proj"
        )
    shapes = {name: linear.weight.spec.shape for name, linear in layout.linears.items()}
    per_head = args.get("strategy") == "attn_head"
    return AttentionPlan(
        strategy="attn_head" if per_head else "tensor",
        observer=str(args.get("observer") or "static_minmax"),
        observer_arguments=args.get("observer_kwargs") or {},
        scales={
            module: {
                f"{module}.{which}_scale": TensorSpec(dtype, (count, 1, 1) if per_head else (1,))
                for which, count in by_side(heads_in(module, heads, shapes)).items()
            }
            for module, dtype in projections.items()
        },
    )


def last_tensors(ckpt: Checkpoint, attention: AttentionPlan) -> dict[str, str]:
    """The last tensor of each attention module on disk -> the module: its scales follow there."""
    last = {}
    for name in ckpt.tensors:
        parent = name.rpartition(".")[0]
        for module in (parent, parent.rpartition(".")[0]):
            if module in attention.scales:
                last[module] = name
    return {name: module for module, name in last.items()}


def _key_projections(layout: Layout, text_config: Mapping[str, Any]) -> dict[str, str]:
    """Attention module -> dtype of its weights, in the order of the layers."""
    found = {}
    for linear in layout.linears.values():
        if linear.kept is not None:
            continue
        kind = attention_kind(linear.name, layout.layers, layout.num_layers, text_config)
        if kind == "latent":
            raise PlanError(
                f"{linear.name}: multi-head latent attention caches no heads of k and v; "
                "KV-cache scales of this model cannot be calibrated per tensor or per head"
            )
        if kind == "heads":
            found[linear.parent] = linear.weight.spec.dtype
    return found


def _check_args(args: Args) -> None:
    """What vLLM accepts of a KV-cache scheme: static symmetric FP8, per tensor or per head."""
    for name, found, choice in kv_scheme_faults({**KV_DEFAULTS, **args}):
        raise PlanError(
            f"the KV-cache scheme has {name} {found!r}; vLLM serves {name} "
            f"{' or '.join(map(repr, choice))}"
        )
