"""What can be written, and vLLM cannot serve: said before the work, not refused, because
transformers and other engines may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptq.plan.match import EXPERT
from ckptq.plan.permutable import keep_permutable
from ckptq.plan.unit import Plan
from ckptq.recipes.load import Group


def vllm_doubts(plan: Plan) -> Iterator[str]:
    """A line for each reason why vLLM would refuse the result, or compute something else."""
    groups = {group.name: group for group in plan.recipe.groups}
    # what llm-compressor has made is no group of the recipe: `verify --engine` judges that
    chosen = {n: groups[g] for g, names in plan.groups.items() if g in groups for n in names}
    split = [name for name, group in chosen.items() if _splits_a_block(plan, name, group, chosen)]
    if split:
        rows = plan.layout.linears[split[0]].weight.spec.shape[0]
        yield (
            f"{len(split)} Linears have rows that fill no whole blocks, {split[0]} {rows} of them; "
            "vLLM merges whole blocks only, and will not load this (fp8-dynamic it does)"
        )
    uneven = _uneven_experts(plan, chosen)
    if uneven is not None:
        yield (
            f"{uneven}: its experts are not all quantized alike, in every projection; vLLM has one "
            "scheme for all of a layer, and will not load this"
        )
    if keep_permutable(plan.recipe, plan.layout, chosen) != plan.recipe:
        yield (
            "q/k in a format whose blocks or zero points vLLM does not permute with the rows: "
            "it will compute something else (without --as-written they get another)"
        )


def _uneven_experts(plan: Plan, chosen: Mapping[str, Group]) -> str | None:
    """The first layer of experts with several schemes, or with some Linears left alone."""
    found: dict[str, object] = {}
    for name in plan.layout.linears:
        match = EXPERT.search(name)
        if match is None:
            continue
        experts = name[: match.start()] + ".experts"
        group = chosen.get(name)
        scheme = (group.weights, group.input_activations, group.format) if group else None
        if found.setdefault(experts, scheme) != scheme:
            return experts
    return None


def _splits_a_block(plan: Plan, name: str, group: Group, chosen: Mapping[str, Group]) -> bool:
    """Whether a member of a fused set, but for the last, ends inside a block of rows."""
    height = ((group.weights or {}).get("block_structure") or [1])[0]
    there = [member for member in plan.layout.fused_set(name) if member in chosen]
    return name in there[:-1] and plan.layout.linears[name].weight.spec.shape[0] % height != 0
