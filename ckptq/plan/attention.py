"""Which attention layers get q/k/v scales, and of what shape.

Shapes as llm-compressor writes them: [1] per tensor; per head [Hq, 1, 1] for q, [Hkv, 1, 1] for k
and v. The dtype is that of the attention module's weights. Latent attention gets the same scale
[1] as k's and v's, for the one row that it caches for all heads, and none for q: engines quantize
another query there, to which they have moved kv_b_proj.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.engines.vllm import kv_scheme_faults
from ckptq.errors import PlanError
from ckptq.models.attention import (
    KEY_PROJECTIONS,
    LATENT_COUNTS,
    AttentionKind,
    attention_kind,
    cache_owners,
    layer_index,
)
from ckptq.models.heads import QUERY_HEADS, Heads, by_side, config_heads, heads_in, layer_heads
from ckptq.models.modules import Layout
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Recipe
from ckptq.spec import TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """The q/k/v scales that calibration must produce, and how."""

    strategy: Literal["tensor", "attn_head"] = "attn_head"
    observer: str = "static_minmax"
    observer_arguments: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, Mapping[str, TensorSpec]] = field(default_factory=dict)
    """Attention module -> full tensor name -> spec."""
    latent: frozenset[str] = frozenset()
    """The modules of latent attention: k and v share a scale, q has none."""
    told: str | None = None
    """Why they are per tensor although per-head scales were requested."""


def plan_attention(
    ckpt: Checkpoint, layout: Layout, args: Args, *, served: bool = True
) -> AttentionPlan:
    """Decide the scales for every decoder layer that has attention heads; PlanError if none has.

    `served` keeps to what vLLM loads: per-head scales become one per layer where the layers
    differ in their number of heads.
    """
    _check_args(args)
    modules = _attention_modules(ckpt, layout)
    wanted = args.strategy == "attn_head"
    latent = _latent(layout, modules, wanted)
    heads = _heads_of(ckpt, layout, (module for module in modules if module not in latent))
    odd = _unlike_the_config(ckpt, heads)
    per_head = wanted and not (served and odd)
    return AttentionPlan(
        strategy="attn_head" if per_head else "tensor",
        observer=args.observer or "static_minmax",
        observer_arguments=args.observer_kwargs,
        scales={
            module: {
                f"{module}.{which}_scale": TensorSpec(found.dtype, (count, 1, 1))
                if per_head
                else TensorSpec(found.dtype, (1,))
                for which, count in counts.items()
            }
            for module, found in modules.items()
            for counts in [LATENT_COUNTS if module in latent else by_side(heads[module])]
        },
        latent=latent,
        told=odd if wanted and not per_head else None,
    )


def as_planned(recipe: Recipe, attention: AttentionPlan) -> Recipe:
    """The recipe with the strategy that the plan has for attention and cache."""
    if attention.told is None:
        return recipe

    def changed(args: Args | None) -> Args | None:
        return replace(args, strategy=attention.strategy) if args is not None else None

    groups = tuple(
        replace(g, input_activations=changed(g.input_activations)) if g.is_attention else g
        for g in recipe.groups
    )
    return replace(recipe, groups=groups, kv_cache_scheme=changed(recipe.kv_cache_scheme))


def last_tensors(ckpt: Checkpoint, attention: AttentionPlan) -> dict[str, str]:
    """The last tensor of each attention module on disk -> the module: its scales follow there."""
    last = {}
    for name in ckpt.tensors:
        parent = name.rpartition(".")[0]
        for module in (parent, parent.rpartition(".")[0]):
            if module in attention.scales:
                last[module] = name
    return {name: module for module, name in last.items()}


@dataclass(frozen=True, slots=True)
class _Module:
    """An attention module: what it caches, and the dtype of its weights."""

    kind: AttentionKind
    dtype: str


def _attention_modules(ckpt: Checkpoint, layout: Layout) -> dict[str, _Module]:
    """By name, in the order of the layers, those that read another layer's cache included."""
    own = _caching(ckpt, layout)
    parents = {
        linear.parent: linear.weight.spec.dtype
        for linear in layout.linears.values()
        if linear.kept is None
    }
    readers = cache_owners(own, parents, layout.num_layers, ckpt.text_config)
    found = {**own, **{module: _Module("heads", parents[module]) for module in readers}}
    return {module: found[module] for module in sorted(found, key=layer_index)}


def _caching(ckpt: Checkpoint, layout: Layout) -> dict[str, _Module]:
    """Those whose Linears compute keys, or the latent that keys are computed of."""
    found = {}
    for linear in layout.linears.values():
        if linear.kept is not None:
            continue
        kind = attention_kind(linear.name, layout.layers, layout.num_layers, ckpt.text_config)
        if kind is not None:
            found[linear.parent] = _Module(kind, linear.weight.spec.dtype)
    if not found:
        raise PlanError(
            f"{ckpt.path}: KV-cache scales were requested, but {_why_none(ckpt, layout)}"
        )
    return found


def _latent(layout: Layout, modules: Mapping[str, _Module], per_head: bool) -> frozenset[str]:
    """The modules of latent attention; PlanError where their cache is not one latent to vLLM, or
    scales per head are wanted of it."""
    latent = frozenset(name for name, module in modules.items() if module.kind == "latent")
    engine = layout.witnesses.engine
    for name in sorted(latent, key=layer_index):
        known = engine.attention(name) if engine is not None else None
        if known is not None and known.kind == "heads":
            raise PlanError(
                f"{name}: vLLM caches k and v heads of this latent attention, transformers the "
                "latent itself; no scale is right for both; use a weights-only scheme"
            )
        if per_head:
            raise PlanError(
                f"{name}: multi-head latent attention caches one latent for all heads, so "
                "nothing there has a scale per head; use fp8-per-tensor, or kv-fp8-per-tensor"
            )
    return latent


def _why_none(ckpt: Checkpoint, layout: Layout) -> str:
    heads, tree = config_heads(ckpt.text_config), layout.witnesses.tree
    if heads is None or (tree is not None and tree.layers and not tree.attending):
        return "this model has no attention heads; use a weights-only scheme"
    if layout.family.transposed_layers:
        return f"{layout.family.name} stores its layers as [in, out] (Conv1D), not as Linears"
    if not layout.layers:
        model = tree.model_class if tree is not None else "the checkpoint"
        return f"{model} has no single list of {layout.num_layers} decoder layers"
    return (
        f"ckptq found no Linear in its decoder layers that computes the keys of {heads[1]} heads "
        f"({', '.join(KEY_PROJECTIONS)}); use a weights-only scheme for this model"
    )


def _heads_of(ckpt: Checkpoint, layout: Layout, modules: Iterable[str]) -> dict[str, Heads]:
    shapes = {name: linear.weight.spec.shape for name, linear in layout.linears.items()}
    found = {}
    for module in modules:
        said = layer_heads(ckpt.text_config, layer_index(module))
        if said is None:
            raise PlanError(
                f"{ckpt.path / CONFIG}: KV-cache scales were requested, but the config gives no "
                f"number of heads for {module} (none of {', '.join(QUERY_HEADS)})"
            )
        found[module] = heads_in(module, said, shapes)
    return found


def _unlike_the_config(ckpt: Checkpoint, heads: Mapping[str, Heads]) -> str | None:
    """vLLM 0.33 asserts as many scales per head in every layer as the config has heads
    (`CompressedTensorsKVCacheMethod`), and the strategy is one for all layers."""
    said = config_heads(ckpt.text_config)
    odd = {module: found for module, found in heads.items() if found != said}
    if not odd or said is None:
        return None
    module, (query, kv) = next(iter(odd.items()))
    return (
        f"attention and cache scales are per tensor instead of per head: {len(odd)} of "
        f"{len(heads)} layers have another number of heads ({module}: {query} and {kv}; "
        f"{CONFIG}: {said[0]} and {said[1]}), and vLLM loads per-head scales only if all "
        "layers agree; --as-written keeps them per head"
    )


def _check_args(args: Args) -> None:
    """What vLLM accepts of a KV-cache scheme: static symmetric FP8, per tensor or per head."""
    for name, found, choice in kv_scheme_faults(replace(args, written=())):
        raise PlanError(
            f"the KV-cache scheme has {name} {found!r}; vLLM serves {name} "
            f"{' or '.join(map(repr, choice))}"
        )
