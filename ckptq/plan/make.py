"""Recipe x checkpoint -> everything that will be read and written. Pure: headers in, data out.

Everything that can be refused is refused here, before any data moves. Later stages follow the plan:
the converter makes what a unit promises, and the writer checks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError, UsageError
from ckptq.models.modules import Layout, Linear, read_layout
from ckptq.models.quantized.kept_numbers import looked_at
from ckptq.models.quantized.repacked import repacked_specs, verbatim
from ckptq.models.weight import Encoded, View
from ckptq.permute.reordered import Source
from ckptq.plan.attention import AttentionPlan, as_planned, last_tensors, plan_attention
from ckptq.plan.fit import UNCHOSEN, fit
from ckptq.plan.left import left_names
from ckptq.plan.match import (
    choose,
    refuse_idle_ignores,
    refuse_split_sets,
    refuse_unread_weights,
    refuse_unserved,
    refuse_unserved_experts,
)
from ckptq.plan.permutable import keep_permutable
from ckptq.plan.repack import carried_scales, repacked
from ckptq.plan.rope import read_marks, reordering
from ckptq.plan.shards import SHARD_BYTES, fill_shards
from ckptq.plan.stored_as_is import copied_units, kept_config
from ckptq.plan.unit import Part, Plan, Unit
from ckptq.quantize.formats import needs_statistic
from ckptq.quantize.stored import stored
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import DEQUANTIZE, Group, Recipe
from ckptq.rope_order import RopeOrder
from ckptq.spec import TensorSpec

RopeChoice = Literal["keep", "half-split"]

MAX_ERRORS = 20
"""How many misfits one message lists."""


def make_plan(
    ckpt: Checkpoint,
    recipe: Recipe,
    *,
    ignore: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
    permutable: bool = True,
    rope_order: RopeChoice = "keep",
) -> Plan:
    """Decide every output tensor from headers, config and recipe; PlanError says what misfits.

    `permutable` keeps to what vLLM serves: Llama-4's q/k/v move out of formats that it cannot
    permute, sets whose blocks of rows it cannot merge are left (`permutable`, `fit`).
    `rope_order` "half-split" writes q/k of interleaved models in the order that kernels use, and
    marks the checkpoint; engines that permute while loading must not load it.
    """
    quantized = ckpt.quantization_config is not None
    if recipe.conversion == DEQUANTIZE and not quantized:
        raise UsageError(f"scheme {recipe.name!r}: {ckpt.path} is not quantized")
    cache_alone = recipe.conversion is None and all(g.is_attention for g in recipe.groups)
    if quantized and (cache_alone or recipe.repacks) and rope_order != "keep":
        raise UsageError(
            f"recipe {recipe.name!r} keeps quantized weights as stored; run `ckptq permute` on "
            "its result to reorder them"
        )
    if quantized and cache_alone:
        return _cache_alone(ckpt, recipe, shard_bytes, served=permutable)
    layout = read_layout(ckpt)
    refuse_unread_weights(ckpt, layout)
    if recipe.repacks:
        layout, recipe = repacked(ckpt, layout, recipe, ignore)
    order = reordering(ckpt, RopeOrder.HALF_SPLIT) if rope_order == "half-split" else None
    refuse_unserved(recipe.groups)
    refuse_idle_ignores(layout, ignore)
    attention = None
    if recipe.attention is not None and recipe.conversion is None:
        attention = plan_attention(ckpt, layout, recipe.attention, served=permutable)
        recipe = as_planned(recipe, attention)
    chosen = choose(layout, recipe, (*recipe.ignore, *ignore))
    if permutable and recipe.conversion is None:
        recipe = keep_permutable(recipe, layout, chosen)
        chosen = choose(layout, recipe, (*recipe.ignore, *ignore))
    refuse_split_sets(layout, chosen)
    refuse_unserved_experts(chosen)
    fitted = fit(layout, recipe, chosen, whole_blocks=permutable)
    recipe, chosen = fitted.recipe, fitted.chosen
    units = tuple(map(fitted.told_in, _units(ckpt, layout, recipe, chosen, attention)))
    if order is not None:
        units = order.units(units)
    _refuse_twins(units)
    if not chosen and attention is None and recipe.conversion is None:
        raise PlanError(
            f"{ckpt.path}: recipe {recipe.name!r} matched no tensor; `ckptq inspect` lists them"
        )
    return Plan(
        recipe=recipe,
        units=units,
        shards=fill_shards(units, shard_bytes),
        groups={
            group.name: tuple(n for n, g in chosen.items() if g is group)
            for group in recipe.groups
            if not group.is_attention
        },
        inputs=_static_inputs(recipe, chosen),
        input_observer=_input_observer(recipe),
        ignore=left_names(layout, chosen, recipe.linears) if chosen else (),
        attention=attention,
        layout=layout,
        marks=order.marks if order is not None else read_marks(ckpt),
        told=(*([attention.told] if attention and attention.told else []), *fitted.told),
    )


def _cache_alone(ckpt: Checkpoint, recipe: Recipe, shard_bytes: int, *, served: bool) -> Plan:
    """Calibrated scales for a quantized checkpoint whose weights stay as they are stored."""
    layout, kept = read_layout(ckpt), kept_config(ckpt)
    attention = plan_attention(ckpt, layout, recipe.attention or Args(), served=served)
    recipe = as_planned(recipe, attention)
    units = tuple(copied_units(ckpt, layout, attention))
    return Plan(
        recipe=recipe,
        units=units,
        shards=fill_shards(units, shard_bytes),
        groups={},
        inputs={},
        input_observer=_input_observer(recipe),
        ignore=kept.ignore,
        attention=attention,
        layout=layout,
        marks=read_marks(ckpt),
        told=(attention.told,) if attention.told else (),
        kept=kept,
    )


def _units(
    ckpt: Checkpoint,
    layout: Layout,
    recipe: Recipe,
    chosen: Mapping[str, Group],
    attention: AttentionPlan | None,
) -> Iterator[Unit]:
    """Walk the source in the order of its bytes; each tensor is in exactly one unit."""
    schemes = {g.name: g.weight_scheme() for g in recipe.groups if g.weights is not None}
    ends = last_tensors(ckpt, attention) if attention else {}
    kept = recipe.repacks
    carried = carried_scales(ckpt) if kept else {}
    split = any(layout.linears[name].weight.index is not None for name in chosen)
    done: set[str] = set()
    errors: list[str] = []
    for name, tensor in ckpt.tensors.items():
        linears = [layout.linears[n] for n in layout.consumed.get(name, ())]
        if name in layout.others:
            yield Unit(key=name, rule=layout.others[name], copies={name: tensor})
        elif name in layout.decoded:
            yield _decoded(layout, layout.decoded[name])
        elif name in carried:
            yield Unit(
                key=name,
                rule="cache scale, as stored",
                copies=carried[name],
                kept=dict.fromkeys(carried[name], "scale"),
            )
        elif name in layout.dropped:
            yield Unit(key=name, rule=layout.dropped[name])
        elif linears and linears[0].weight.index is not None and not split:
            # vLLM reads fused experts as long as no layer of the checkpoint holds them one by one
            yield Unit(key=name, rule="experts left alone", copies={name: tensor})
        else:
            for linear in linears:
                try:
                    yield from _linear_unit(layout, linear, tensor, chosen, schemes, done, kept)
                except PlanError as error:
                    errors.append(str(error))
        if attention is not None and name in ends:
            module = ends[name]
            yield Unit(key=module, rule="calibrated", scales=attention.scales[module])
    if errors:
        more = f"\nand {len(errors) - MAX_ERRORS} more" if len(errors) > MAX_ERRORS else ""
        raise PlanError("\n".join(errors[:MAX_ERRORS]) + more)


def _static_inputs(recipe: Recipe, chosen: Mapping[str, Group]) -> dict[str, float]:
    """What has to be calibrated; a source that is repacked has its scales."""
    if recipe.repacks:
        return {}
    return {n: g.largest_input for n, g in chosen.items() if g.input_scale}


def _input_observer(recipe: Recipe) -> str:
    """The one observer of all static activations; PlanError where groups name several."""
    static = [g.inputs for g in recipe.groups if g.input_scale]
    names = {args.observer or "static_minmax" for args in static if args is not None}
    if len(names) > 1:
        raise PlanError(f"static input_activations use several observers: {sorted(names)}")
    return names.pop() if names else "static_minmax"


def _linear_unit(
    layout: Layout,
    linear: Linear,
    tensor: StoredTensor,
    chosen: Mapping[str, Group],
    schemes: Mapping[str, WeightScheme],
    done: set[str],
    kept: bool,
) -> Iterator[Unit]:
    """The unit of a Linear, unless a sibling has already taken it along."""
    if linear.name in done:
        return
    group = chosen.get(linear.name)
    if group is None:
        done.add(linear.name)
        yield _left_alone(linear, tensor)
        return
    if kept:
        done.add(linear.name)
        yield _kept(linear, group)
        return
    members = _together(layout, linear, schemes[group.name], chosen)
    done.update(m.name for m in members)
    yield _quantized(members, schemes[group.name], group)


def _together(
    layout: Layout, linear: Linear, scheme: WeightScheme, chosen: Mapping[str, Group]
) -> list[Linear]:
    """The Linears that have to be in one unit with this one."""
    if needs_statistic(scheme):
        return [layout.linears[n] for n in layout.fused_set(linear.name)]
    if linear.weight.streams:
        return [linear]
    siblings = (layout.linears[n] for n in layout.consumed[linear.weight.stored.name])
    return [s for s in siblings if s.weight.slab == linear.weight.slab and s.name in chosen]


def _quantized(members: Iterable[Linear], scheme: WeightScheme, group: Group) -> Unit:
    parts, biases, inputs = [], {}, {}
    for linear in members:
        try:
            writes = stored(linear.weight.spec, scheme)
        except PlanError as error:
            raise PlanError(f"{linear.name}: {error}") from error
        parts.append(Part(linear=linear, weight=linear.weight, scheme=scheme, writes=writes))
        if linear.bias is not None:
            biases[f"{linear.name}.bias"] = linear.bias
        if group.input_scale is not None:
            own = linear.weight.spec.dtype
            dtype = "F32" if group.input_scale == "input_global_scale" else own
            inputs[f"{linear.name}.{group.input_scale}"] = TensorSpec(dtype, (1,))
    return Unit(
        key=parts[0].linear.name,
        rule=f"{group.name}: {scheme}",
        parts=tuple(parts),
        views=biases,
        scales=inputs,
    )


def _kept(linear: Linear, group: Group) -> Unit:
    """The source's codes and scales, in compressed-tensors' layout."""
    weight = linear.weight
    assert isinstance(weight, Encoded)
    copied = {f"{linear.name}.{local}": tensor for local, tensor in verbatim(weight).items()}
    part = Part(
        linear=linear,
        weight=weight,
        scheme=weight.scheme,
        writes={
            n: spec
            for n, spec in repacked_specs(weight).items()
            if f"{linear.name}.{n}" not in copied
        },
        kept=True,
    )
    return Unit(
        key=linear.name,
        rule=f"{group.name}: {weight.scheme}, as stored",
        copies=copied,
        kept=looked_at(copied, weight.scheme),
        parts=(part,),
    )


def _left_alone(linear: Linear, tensor: StoredTensor) -> Unit:
    rule = linear.kept or UNCHOSEN
    if isinstance(linear.weight, Encoded):
        rule += "; dequantized"
    if isinstance(linear.weight, View) and linear.weight.index is None:
        return Unit(key=tensor.name, rule=rule, copies={tensor.name: tensor})
    views: dict[str, Source] = {f"{linear.name}.weight": linear.weight}
    if linear.bias is not None:
        views[f"{linear.name}.bias"] = linear.bias
    return Unit(key=linear.name, rule=rule, views=views)


def _decoded(layout: Layout, weight: Encoded) -> Unit:
    rule = f"{layout.whole_experts[weight.name]}; dequantized"
    return Unit(key=weight.plain, rule=rule, views={weight.plain: weight})


def _refuse_twins(units: Iterable[Unit]) -> None:
    seen: set[str] = set()
    for unit in units:
        for name in unit.writes:
            if name in seen:
                raise PlanError(f"{name}: two source tensors would get this name")
            seen.add(name)
