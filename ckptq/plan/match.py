"""Which group of a recipe quantizes which Linear, decided as vLLM will decide it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError, UsageError
from ckptq.models.experts import FUSED_WEIGHT, experts_of
from ckptq.models.modules import Layout, Linear
from ckptq.models.quantized.readable import refuse_bare_codes, unread
from ckptq.models.witnesses import NAMEABLE, Witnesses
from ckptq.plan.left import EXPECTED
from ckptq.recipes.args import LOCAL, Args
from ckptq.recipes.names import broken, read_names
from ckptq.recipes.scheme import Group, Recipe, Scheme
from ckptq.spec import FLOATS

NVFP4 = Args(num_bits=4, type="float", strategy="tensor_group", group_size=16)
NVFP4_FIELDS = ("num_bits", "type", "strategy", "group_size", "dynamic")


def choose(layout: Layout, recipe: Recipe, ignore: Sequence[str]) -> dict[str, Group]:
    """Linear -> group, for every Linear that is quantized.

    PlanError for a group without any, and for a family whose layers hold no Linears.
    An exact name or `re:` pattern is stronger than a class name; of several, the first one counts.
    """
    groups = recipe.linears
    for group in groups:
        if group.weights is None:
            raise PlanError(f"group {group.name!r} has neither weights nor input_activations")
    if groups and layout.family.transposed_layers:
        raise PlanError(
            f"recipe {recipe.name!r}: {layout.family.name} stores its layers as [in, out] "
            "(Conv1D); expected Linears, [out, in]"
        )
    if layout.witnesses.silent and any("Linear" in g.targets for g in groups):
        raise PlanError(_unknown(layout.witnesses))
    scheme = replace(recipe, ignore=tuple(ignore))
    found = {linear.name: _group_of(scheme, linear) for linear in layout.linears.values()}
    chosen = {name: group for name, group in found.items() if group is not None}
    for group in groups:
        if group not in chosen.values():
            raise PlanError(
                f"recipe {recipe.name!r}: group {group.name!r} with targets "
                f"{list(group.targets)} matched no Linear{_why_none(layout, group)}; "
                "run `ckptq inspect` to list their names"
            )
    return chosen


def _group_of(scheme: Scheme, linear: Linear) -> Group | None:
    """As llm-compressor matches: a Linear's own name, and its class where nothing keeps it."""
    if linear.kept not in (None, *NAMEABLE):
        return None
    by_class = linear.kept is None
    return scheme.group_of(linear.name, of_class=lambda target: by_class and target == "Linear")


def _why_none(layout: Layout, group: Group) -> str:
    """Why most of the Linears that a group means stay, or "" where it means none."""
    meant = [
        linear
        for linear in layout.linears.values()
        if ("Linear" in group.targets or group.named.match(linear.name))
        and linear.kept not in EXPECTED
    ]
    if not meant:
        return ""
    reasons = Counter(linear.kept or "ignored" for linear in meant)
    reason, count = reasons.most_common(1)[0]
    first = next(linear.name for linear in meant if (linear.kept or "ignored") == reason)
    return f": {count} of {len(meant)} are protected, such as {first} ({reason})"


def _unknown(witnesses: Witnesses) -> str:
    names = ", ".join(witnesses.architectures) or "no architecture in config.json"
    return (
        f"{names}: unknown to both transformers and vLLM's table of models, so ckptq cannot tell "
        f"which modules are Linears ({witnesses.no_tree}); give a recipe whose targets name them, "
        'such as "re:.*layers.*_proj$"'
    )


def refuse_idle_ignores(layout: Layout, ignore: Sequence[str]) -> None:
    """PlanError for an `--ignore` that matches nothing: a typo would quantize what it should
    protect.

    A tied output head is not stored, but may be named.
    """
    for pattern in ignore:
        if (why := broken(pattern)) is not None:
            raise UsageError(f"--ignore {pattern!r}: not a regular expression: {why}")
        names = read_names([pattern])
        if not any(names.match(name) for name in (*layout.linears, "lm_head")):
            raise PlanError(
                f"--ignore {pattern!r}: matches no Linear of this checkpoint; expected a full name "
                "or re:PATTERN, matched from the start; run `ckptq inspect` to list the names"
            )


def refuse_unread_weights(ckpt: Checkpoint, layout: Layout) -> None:
    """SourceError for a weight that is neither a float nor declared as quantized.

    It would be copied like any other tensor, and no engine could interpret its codes.
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
            raise PlanError(f"the members of a fused set must be quantized alike; found {detail}")


def refuse_unserved(groups: Sequence[Group]) -> None:
    """PlanError for activation schemes that vLLM does not support."""
    for group in groups:
        if group.output_activations is not None:
            raise PlanError(f"group {group.name!r}: vLLM does not support output_activations")
        weights, inputs = group.weights, group.inputs
        if weights is None or inputs is None:
            continue
        if NVFP4.strategy in (inputs.strategy, weights.strategy):
            _refuse_half_nvfp4(group.name, "weights", weights, NVFP4)
            _refuse_half_nvfp4(
                group.name, "input_activations", inputs, replace(NVFP4, dynamic=LOCAL)
            )
        elif inputs.dynamic is False and inputs.strategy != "tensor":
            raise PlanError(
                f"group {group.name!r}: static input_activations have strategy "
                f"{inputs.strategy!r}; vLLM supports static activations only per tensor"
            )


def refuse_unserved_experts(chosen: Mapping[str, Group]) -> None:
    """vLLM 0.32 has Linears with packed integers and integer activations, but no such experts."""
    for name, group in chosen.items():
        weights, inputs = group.weights, group.inputs
        if weights is None or inputs is None or inputs.type != "int":
            continue
        if group.format == "pack-quantized" and experts_of(name):
            raise PlanError(
                f"{name}: group {group.name!r}: vLLM cannot serve "
                f"W{weights.num_bits}A{inputs.num_bits} experts; "
                "supported: W8A8, W4A8, W4AFP8, and integers of 2 to 8 bits without activations"
            )


def _refuse_half_nvfp4(group: str, part: str, args: Args, served: Args) -> None:
    """vLLM multiplies NVFP4 by NVFP4, its inputs scaled per group under a static global scale."""
    found, wanted = ({name: getattr(a, name) for name in NVFP4_FIELDS} for a in (args, served))
    if found != wanted or not args.symmetric:
        raise PlanError(
            f"group {group!r}: vLLM supports NVFP4 activations only with NVFP4 weights: "
            f"{part} are {found}, expected {wanted}"
        )
