"""Which group of a recipe quantizes which Linear, decided as vLLM will decide it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.models.experts import FUSED_WEIGHT, experts_of
from ckptq.models.family import in_layers
from ckptq.models.modules import Layout
from ckptq.models.readable import refuse_bare_codes, unread
from ckptq.models.witnesses import NAMEABLE, Witnesses
from ckptq.patterns import matches
from ckptq.plan.left import EXPECTED
from ckptq.recipes.load import Group, Recipe, check_patterns
from ckptq.spec import FLOATS

SHOWN = 3
"""How many missing tensors a message names."""

STATIC = (None, "tensor")
"""Strategies of static activations that vLLM serves."""

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def choose(layout: Layout, recipe: Recipe, ignore: Sequence[str]) -> dict[str, Group]:
    """Linear -> group, for every Linear that is quantized.

    PlanError for a group without any, and for a family whose layers hold no Linears.
    An exact name or `re:` pattern is stronger than a class name; of several, the first one counts.
    """
    groups = [g for g in recipe.groups if not g.is_attention]
    for group in groups:
        if group.weights is None:
            raise PlanError(f"group {group.name!r} has neither weights nor input_activations")
    if groups and layout.family.transposed_layers:
        raise PlanError(
            f"recipe {recipe.name!r}: layers of {layout.family.name} are stored as [in, out] "
            "(Conv1D); wanted Linears, [out, in]"
        )
    if layout.witnesses.silent and any("Linear" in g.targets for g in groups):
        raise PlanError(_unknown(layout.witnesses))
    chosen = {}
    for linear in layout.linears.values():
        if any(matches(pattern, linear.name) for pattern in ignore):
            continue
        named = [g for g in groups if any(matches(t, linear.name) for t in g.targets)]
        by_class = [g for g in groups if "Linear" in g.targets]
        if named and linear.kept in (None, *NAMEABLE):
            chosen[linear.name] = named[0]
        elif by_class and linear.kept is None:
            chosen[linear.name] = by_class[0]
    for group in groups:
        if group not in chosen.values():
            raise PlanError(
                f"recipe {recipe.name!r}: group {group.name!r} with targets "
                f"{list(group.targets)} matched no Linear{_why_none(layout, group)}; "
                "`ckptq inspect` lists their names"
            )
    return chosen


def _why_none(layout: Layout, group: Group) -> str:
    """Why most of the Linears that a group means stay, or "" where it means none."""
    meant = [
        linear
        for linear in layout.linears.values()
        if any(t == "Linear" or matches(t, linear.name) for t in group.targets)
        and linear.kept not in EXPECTED
    ]
    if not meant:
        return ""
    reasons = Counter(linear.kept or "ignored" for linear in meant)
    reason, count = reasons.most_common(1)[0]
    first = next(linear.name for linear in meant if (linear.kept or "ignored") == reason)
    return f": {count} of {len(meant)} stay, {first} for one ({reason})"


def _unknown(witnesses: Witnesses) -> str:
    names = ", ".join(witnesses.architectures) or "no architecture in config.json"
    return (
        f"{names}: known to neither transformers nor the table of vLLM's models, so ckptq cannot "
        f"tell which modules are Linears ({witnesses.no_tree}); give a recipe whose targets name "
        'them, such as "re:.*layers.*_proj$"'
    )


def refuse_idle_ignores(layout: Layout, ignore: Sequence[str]) -> None:
    """PlanError for `--ignore` of what is not there: a typo would quantize what was to be left.

    An output head that is tied to the embedding is not stored, and may be named all the same.
    """
    check_patterns("--ignore", ignore)
    for pattern in ignore:
        if not any(matches(pattern, name) for name in (*layout.linears, "lm_head")):
            raise PlanError(
                f"--ignore {pattern!r}: matches no Linear of this checkpoint; wanted a full name "
                "or re:PATTERN, which is matched from the start; `ckptq inspect` lists the names"
            )


def refuse_holes(ckpt: Checkpoint, layout: Layout) -> None:
    """SourceError for a source that lacks tensors: of a layer, an expert, or its output head.

    The result would lack them too, and an engine would serve whatever is in that memory.
    """
    tree = layout.witnesses.tree
    if tree is not None and tree.lacking:
        shown = ", ".join(tree.lacking[:SHOWN])
        more = f" and {len(tree.lacking) - SHOWN} more" if len(tree.lacking) > SHOWN else ""
        raise SourceError(
            f"{ckpt.path}: lacks {shown}{more}, which transformers' {tree.model_class} of its "
            "config.json needs; fetch it again, or correct config.json"
        )
    there = {int(m["index"]) for n in ckpt.tensors if (m := in_layers(n, layout.layers))}
    gone = [index for index in range(layout.num_layers) if index not in there]
    if tree is None and layout.layers and gone and "block_configs" not in ckpt.text_config:
        raise SourceError(
            f"{ckpt.path}: has no tensor of {layout.layers}.{gone[0]}; config.json says "
            f"{layout.num_layers} layers, and {len(there)} are there"
        )


def refuse_unread_weights(ckpt: Checkpoint, layout: Layout) -> None:
    """SourceError for a weight that is neither a float nor declared as quantized.

    It would be copied as if it were no weight, and no engine could tell what its codes mean.
    """
    others = [ckpt.tensors[name] for name in layout.others]
    refuse_bare_codes(others)
    for tensor in others:
        if tensor.spec.dtype not in FLOATS and _is_weight(layout, tensor):
            raise unread(tensor)


def _is_weight(layout: Layout, tensor: StoredTensor) -> bool:
    module, _, local = tensor.name.rpartition(".")
    if FUSED_WEIGHT.match(tensor.name):
        return True
    kept = layout.witnesses.why_kept(module)
    return local == "weight" and len(tensor.spec.shape) == 2 and kept is None


def refuse_split_sets(layout: Layout, chosen: Mapping[str, Group]) -> None:
    """vLLM merges q/k/v and gate/up; their shards must agree on a scheme."""
    for name in layout.linears:
        members = layout.fused_set(name)
        if members[0] != name:
            continue
        found = {member: chosen.get(member) for member in members}
        if len({group.name if group else None for group in found.values()}) > 1:
            detail = ", ".join(f"{m}: {g.name if g else 'left alone'}" for m, g in found.items())
            raise PlanError(f"a fused set must be quantized alike, found {detail}")


def refuse_unserved(groups: Sequence[Group]) -> None:
    """Activations that ckptq has no scales for, named instead of forgotten."""
    for group in groups:
        if group.output_activations is not None:
            raise PlanError(f"group {group.name!r}: output_activations are not served by vLLM")
        inputs = group.input_activations if group.weights is not None else None
        if inputs is None:
            continue
        if "tensor_group" in (inputs.get("strategy"), (group.weights or {}).get("strategy")):
            _refuse_half_nvfp4(group)
        elif inputs.get("dynamic", False) is False and inputs.get("strategy") not in STATIC:
            raise PlanError(
                f"group {group.name!r}: static input_activations have strategy "
                f"{inputs.get('strategy')!r}; vLLM serves static activations per tensor"
            )


def refuse_unserved_experts(chosen: Mapping[str, Group]) -> None:
    """vLLM 0.32 has Linears with packed integers and integer activations, but no such experts."""
    for name, group in chosen.items():
        kind = (group.input_activations or {}).get("type")
        if kind == "int" and group.format == "pack-quantized" and experts_of(name):
            bits = (
                (group.weights or {}).get("num_bits"),
                (group.input_activations or {}).get("num_bits"),
            )
            raise PlanError(
                f"{name}: group {group.name!r}: vLLM cannot serve W{bits[0]}A{bits[1]} experts; "
                "supported: W8A8, W4A8, W4AFP8, and integers of 2 to 8 bits without activations"
            )


def _refuse_half_nvfp4(group: Group) -> None:
    """vLLM multiplies NVFP4 by NVFP4, its inputs scaled per group under a static global scale."""
    for part, args in (("weights", group.weights), ("input_activations", group.input_activations)):
        wanted = NVFP4 | {"dynamic": "local" if part == "input_activations" else False}
        given = {"symmetric": True, "dynamic": False} | dict(args or {})
        found = {key: given.get(key) for key in wanted}
        if found != wanted or not given["symmetric"]:
            raise PlanError(
                f"group {group.name!r}: vLLM serves NVFP4 activations with NVFP4 weights only: "
                f"{part} are {found}, wanted {wanted}"
            )
