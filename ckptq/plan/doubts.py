"""Warnings before the work: what can be written although vLLM or transformers cannot load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptq.engines.table import load_table
from ckptq.engines.transformers import dtype_clash, loads_fused_experts
from ckptq.engines.vllm import (
    LATENT_SCALES,
    fills_whole_blocks,
    loads_with_plain_inputs,
    without_kernel,
)
from ckptq.models.experts import experts_of
from ckptq.models.heads import OUTPUTS
from ckptq.models.unserved import model_doubts
from ckptq.numbered import starred
from ckptq.plan.permutable import keep_permutable
from ckptq.plan.unit import Plan
from ckptq.recipes.scheme import Group


def vllm_doubts(plan: Plan) -> Iterator[str]:
    """A line for each reason why vLLM would refuse the result, or compute something else."""
    linears = (name for name, linear in plan.layout.linears.items() if linear.kept is None)
    if whole := list(model_doubts(plan.layout.witnesses, linears)):
        yield from whole
        return
    yield from _cache_scales_refused(plan)
    chosen = _chosen(plan)
    yield from _experts_refused(plan, chosen)
    yield from _integers_unpacked(chosen)
    yield from _without_kernel(plan, chosen)
    split = [name for name, group in chosen.items() if _splits_a_block(plan, name, group, chosen)]
    if split:
        rows = plan.layout.linears[split[0]].weight.spec.shape[0]
        yield (
            f"{len(split)} Linears have rows that do not fill whole blocks ({split[0]}: {rows}); "
            "vLLM merges whole blocks only and will not load this; it loads fp8-dynamic"
        )
    uneven = _uneven_experts(plan, chosen)
    if uneven is not None:
        yield (
            f"{uneven}: its experts are not all quantized alike in every projection; vLLM supports "
            "one scheme per layer and will not load this"
        )
    if keep_permutable(plan.recipe, plan.layout, chosen) != plan.recipe:
        yield (
            "q/k are in a format whose blocks or zero points vLLM does not permute with the rows: "
            "results will be wrong (without --as-written they get another format)"
        )


def _chosen(plan: Plan) -> dict[str, Group]:
    """Linear -> group. Results of llm-compressor have no group here: `verify --engine` checks
    those."""
    groups = {group.name: group for group in plan.recipe.groups}
    return {n: groups[g] for g, names in plan.groups.items() if g in groups for n in names}


def _cache_scales_refused(plan: Plan) -> Iterator[str]:
    engine = plan.layout.witnesses.engine
    if plan.attention is None or engine is None or engine.cache_scales == "k_scale":
        if plan.attention is not None and plan.attention.latent:
            yield (
                f"vLLM {load_table().version} has no place for cache scales of latent attention "
                f"in compressed-tensors' format: it {LATENT_SCALES}"
            )
        return
    if engine.cache_scales is None:
        reason = engine.refusals.get("cache", "").partition(". ")[0]
    else:
        reason = f"it looks for {engine.cache_scales}, and transformers for k_scale"
    yield (
        f"vLLM does not load KV-cache scales for {engine.name} ({reason}); use a weights-only "
        "scheme for it"
    )


def _integers_unpacked(chosen: Mapping[str, Group]) -> Iterator[str]:
    for group in {group.name: group for group in chosen.values()}.values():
        if group.input_activations is None and not loads_with_plain_inputs(group):
            yield (
                f"group {group.name!r} is {group.format} with unquantized inputs; vLLM loads "
                "weight-only integers only as pack-quantized"
            )


def _without_kernel(plan: Plan, chosen: Mapping[str, Group]) -> Iterator[str]:
    first: dict[str, str] = {}
    for name, group in chosen.items():
        columns = plan.layout.linears[name].weight.spec.shape[1]
        reason = without_kernel(group, columns) if experts_of(name) is None else None
        if reason is not None:
            first.setdefault(reason, name)
    yield from (f"{name}: {reason}" for reason, name in first.items())


def _experts_refused(plan: Plan, chosen: Mapping[str, Group]) -> Iterator[str]:
    engine = plan.layout.witnesses.engine
    reason = engine.refusals.get("weights") if engine is not None else None
    first = next((n for n in chosen if engine and engine.experts(n)), None)
    if engine is not None and reason is not None and first is not None:
        yield (
            f"{first}: vLLM does not load quantized experts for {engine.name} "
            f"({reason.partition('. ')[0]}); --ignore 're:.*experts.*' leaves them unquantized"
        )


def transformers_doubts(plan: Plan) -> Iterator[str]:
    """What transformers would refuse or load wrongly; that vLLM serves it only where it does."""
    served = not any(vllm_doubts(plan))
    for line in _transformers_doubts(plan):
        yield line if served else line.partition("; vLLM ")[0]


def _transformers_doubts(plan: Plan) -> Iterator[str]:
    yield from dict.fromkeys(
        reason
        for name, group in _chosen(plan).items()
        if (reason := _transformers_objection(plan, name, group)) is not None
    )
    yield from _experts_mixed(plan)
    tree = plan.layout.witnesses.tree
    if tree is not None and (homeless := _without_place_in_transformers(plan)):
        yield (
            f"transformers cannot read {len(homeless)} of the quantized Linears, such as "
            f"{homeless[0]}: its {tree.model_class} has no such modules"
        )
    if plan.attention is not None and len(_widths(plan)) > 1:
        yield ("transformers cannot read attention scales if layers differ in head size; vLLM can")
    yield from _attention_unlike_transformers(plan)
    formats = {group.format for group in _chosen(plan).values()}
    if tree is not None and (clash := dtype_clash(formats, tree.dtype)) is not None:
        yield f"transformers {clash}; vLLM runs it"


def _experts_mixed(plan: Plan) -> Iterator[str]:
    """transformers reads the experts of all layers by one group (`get_experts_scheme`); where it is
    FP8, unquantized ones pass, as they have the same names."""
    chosen, witnesses = _chosen(plan), plan.layout.witnesses
    found = {
        None if group is None else (group.weights, group.format)
        for name, linear in plan.layout.linears.items()
        if experts_of(name) and linear.kept is None
        for group in (chosen.get(name),)
        if (owner := witnesses.owner(name)) is not None
        if owner.fused is not None and not owner.fused.taken_apart
    }
    packed = any(each is not None and "pack" in str(each[1]) for each in found)
    if len(found if packed else found - {None}) > 1:
        yield (
            "transformers reads the experts of all layers in one scheme, so it cannot load layers "
            "whose experts differ; vLLM can"
        )


def _attention_unlike_transformers(plan: Plan) -> Iterator[str]:
    """compressed-tensors decides by class and attributes what is attention with a cache
    (`is_cached_attention_module`): layers without keys of their own are none, linear attention may
    be."""
    tree = plan.layout.witnesses.tree
    if plan.attention is None or tree is None:
        return
    if tree.attention and tree.no_cache_sizes is not None:
        yield (
            f"transformers cannot read attention scales of {tree.model_class}: compressed-tensors "
            f"says {tree.no_cache_sizes!r}"
        )
        return
    if not tree.runs_attention_groups and any(g.is_attention for g in plan.recipe.groups):
        yield (
            f"transformers cannot run {tree.model_class} with attention scales: it supports "
            "only eager attention, which compressed-tensors does not hook into; vLLM can (both can "
            "with cache scales alone, kv-fp8-per-head)"
        )
    inside = {linear.parent: name for name, linear in plan.layout.linears.items()}
    scaled = {
        tree.module(inside.get(module, f"{module}.")).rpartition(".")[0]: module
        for module in plan.attention.scales
    }
    unread = [disk for theirs, disk in scaled.items() if theirs not in tree.attention]
    if unread:
        yield (
            f"transformers cannot read the attention scales of {len(unread)} modules, such as "
            f"{unread[0]}: compressed-tensors does not treat them as attention with a cache and "
            "drops the scales"
        )
    if wanted := sorted(tree.attention - scaled.keys()):
        yield (
            f"transformers will report missing keys: compressed-tensors expects cache scales for "
            f"{len(wanted)} more modules, such as {wanted[0]}"
        )


def _without_place_in_transformers(plan: Plan) -> list[str]:
    """Quantized Linears that transformers' model makes nothing of, as experts where it does not
    know the model_type that tells it to fuse them (Kimi-K2 as DeepseekV3ForCausalLM)."""
    linears, witnesses = plan.layout.linears, plan.layout.witnesses
    chosen = ((name, linears[name].weight) for name in _chosen(plan))
    return [
        name for name, weight in chosen if weight.index is None and witnesses.owner(name) is None
    ]


def _transformers_objection(plan: Plan, name: str, group: Group) -> str | None:
    linear, witnesses = plan.layout.linears[name], plan.layout.witnesses
    fused = linear.weight.index is not None
    owner = witnesses.owner(linear.weight.stored.name.removesuffix(".weight") if fused else name)
    if owner is None:
        return None
    if owner.fused is not None and fused and not owner.fused.one_by_one:
        return (
            f"transformers loads the experts of {owner.class_name} only as one fused tensor, so it "
            "cannot load this checkpoint; vLLM loads them one by one"
        )
    if owner.fused is not None and owner.fused.dealt_out:
        return (
            f"transformers cannot read quantized experts of {owner.class_name}, which it splits "
            "between several modules"
        )
    stacked = owner.fused is not None and not owner.fused.taken_apart
    if stacked and not loads_fused_experts(group):
        return (
            f"transformers cannot read experts in the format of group {group.name!r} "
            f"({group.format}); vLLM can"
        )
    packed = group.format is not None and "pack" in group.format
    tree = witnesses.tree
    if packed and tree is not None and starred(tree.module(name)) in tree.wants_weights:
        return (
            f"transformers cannot read packed weights of this model: it initializes "
            f"{starred(name)} through its weight; vLLM can"
        )
    if owner.own_forward and packed:
        return (
            f"transformers cannot read packed weights of {owner.class_name}, whose forward pass "
            "uses the weight directly; vLLM can"
        )
    if owner.tied:
        return (
            "transformers cannot read quantized weights shared between layers: it ties the "
            "weight but not its scales; vLLM can"
        )
    return None


def _widths(plan: Plan) -> set[int]:
    """Columns of the output projections of the attention layers that have scales."""
    assert plan.attention is not None
    linears = plan.layout.linears
    names = (f"{module}.{out}" for module in plan.attention.scales for out in OUTPUTS)
    return {linears[name].weight.spec.shape[1] for name in names if name in linears}


def _uneven_experts(plan: Plan, chosen: Mapping[str, Group]) -> str | None:
    """The first layer of experts with several schemes, or with some Linears left alone."""
    found: dict[str, object] = {}
    for name in plan.layout.linears:
        experts = experts_of(name)
        if experts is None:
            continue
        group = chosen.get(name)
        scheme = (group.weights, group.input_activations, group.format) if group else None
        if found.setdefault(experts, scheme) != scheme:
            return experts
    return None


def _splits_a_block(plan: Plan, name: str, group: Group, chosen: Mapping[str, Group]) -> bool:
    """Whether a Linear ends inside a block of rows where vLLM merges whole ones only."""
    height = group.block_height
    there = [member for member in plan.layout.fused_set(name) if member in chosen]
    whole = fills_whole_blocks(name, there, of_expert=experts_of(name) is not None)
    return whole and plan.layout.linears[name].weight.spec.shape[0] % height != 0
