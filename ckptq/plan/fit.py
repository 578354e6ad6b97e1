"""Linears whose shape a format cannot hold are left unquantized, and the plan says so.

One odd width is no reason to refuse a model. A Linear that does not fit takes along those that must
share its scheme: the set that vLLM merges, all experts of a layer. vLLM 0.32:

- groups must divide the columns, of weights as of activations (`per_token_group_quant_fp8` asserts
  it on a GPU, for block FP8 too, whose weights alone could end in half a block);
- blocks of rows must be whole in every member of a merged set but the last, and in all of an
  expert's (`validate_fp8_block_shape`, `validate_fp8_block_shape_moe`);
- packed integers fill whole words: along the columns, with zero points along the rows too;
- where a class cuts every tensor of a Linear by heads (`RESHAPED`), each must have the rows.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptq.engines.vllm import RESHAPED, fills_whole_blocks
from ckptq.errors import PlanError
from ckptq.models.experts import experts_of
from ckptq.models.family import LAYER
from ckptq.models.modules import Layout, Linear
from ckptq.plan.unit import Unit
from ckptq.quantize.stored import stored
from ckptq.recipes.group_size import sizes_of
from ckptq.recipes.scheme import Group, Recipe

UNCHOSEN = "not targeted, or ignored"
"""Why a Linear is left that no rule protects."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why a Linear cannot be quantized as asked."""

    why: str
    columns: int
    group: Group = field(hash=False, compare=False)
    of_width: bool = True
    """Whether another group size may help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What is quantized after all."""

    recipe: Recipe
    """Without groups that have nothing left to quantize."""
    chosen: dict[str, Group]
    left: Mapping[str, str]
    """Linear -> why it is left as it is."""
    told: tuple[str, ...]
    """A line for each reason."""

    def told_in(self, unit: Unit) -> Unit:
        """A unit of a Linear that is left, with the reason as its rule."""
        name = unit.key if unit.key in self.left else unit.key.removesuffix(".weight")
        if name not in self.left or unit.parts:
            return unit
        return replace(unit, rule=unit.rule.replace(UNCHOSEN, self.left[name]))


def fit(
    layout: Layout, recipe: Recipe, chosen: dict[str, Group], *, whole_blocks: bool = True
) -> Fit:
    """Take out of `chosen` (Linear -> group) what its format cannot hold.

    `whole_blocks` False leaves blocks of rows that only vLLM cannot merge. PlanError where nothing
    would be quantized.
    """
    misfits: dict[str, Misfit] = {}
    taken: dict[str, Misfit] = {}
    together = quantized_together(layout, chosen)
    for name, group in chosen.items():
        misfit = _misfit(layout, name, group, chosen, whole_blocks)
        if misfit is None:
            continue
        misfits[name] = misfit
        if name not in taken:
            taken |= {other: misfit for other in together[name] if other not in taken}
    if not taken:
        return Fit(recipe=recipe, chosen=chosen, left={}, told=())
    lines = list(_lines(layout, misfits, taken))
    kept = {name: group for name, group in chosen.items() if name not in taken}
    if not kept:
        raise PlanError(
            f"recipe {recipe.name!r} fits none of the Linears of this model:\n" + "\n".join(lines)
        )
    groups = tuple(g for g in recipe.groups if g.is_attention or g in kept.values())
    return Fit(
        recipe=replace(recipe, groups=groups),
        chosen=kept,
        left={name: misfit.why for name, misfit in taken.items()},
        told=tuple(f"left unquantized: {line}" for line in lines),
    )


def quantized_together(layout: Layout, chosen: Collection[str]) -> dict[str, Sequence[str]]:
    """Of Linears that are quantized: Linear -> those that must have its scheme, itself included."""
    experts: dict[str, list[str]] = {}
    for name in chosen:
        if place := experts_of(name):
            experts.setdefault(place, []).append(name)
    return {name: experts.get(experts_of(name) or "") or layout.fused_set(name) for name in chosen}


def _misfit(
    layout: Layout, name: str, group: Group, chosen: Mapping[str, Group], whole_blocks: bool
) -> Misfit | None:
    linear = layout.linears[name]
    R, C = linear.weight.spec.shape
    why = _columns(C, group) or _words(R, C, group)
    if why is None and whole_blocks and not _last(linear, layout, chosen):
        height = group.block_height
        why = f"{R} rows are not a whole number of blocks of {height}, which vLLM requires"
        why = why if R % height else None
    if why is None and _is_cut_by_heads(layout, name, group):
        why = f"vLLM's {_engine_class(layout)} splits all its tensors by heads"
        return Misfit(f"{why}, but {group.format} has tensors without rows", C, group, False)
    return None if why is None else Misfit(why, C, group)


def _is_cut_by_heads(layout: Layout, name: str, group: Group) -> bool:
    linear = layout.linears[name]
    if linear.projection not in RESHAPED.get(_engine_class(layout), ()):
        return False
    specs = stored(linear.weight.spec, group.weight_scheme()).values()
    return bool(group.input_scale) or any(
        spec.shape[:1] != linear.weight.spec.shape[:1] for spec in specs
    )


def _engine_class(layout: Layout) -> str:
    engine = layout.witnesses.engine
    return engine.engine_class if engine is not None else ""


def _columns(C: int, group: Group) -> str | None:
    """Groups of weights, and those that inputs are quantized in, must divide the columns."""
    for what, args in (("groups", group.weights), ("activations in groups", group.inputs)):
        size = args.columns if args is not None else None
        if size and C % size:
            return f"{what} of {size} do not divide {C} columns"
    return None


def _words(R: int, C: int, group: Group) -> str | None:
    """Codes and zero points that are packed into int32 must fill them."""
    weights = group.weights
    if weights is None or group.format != "pack-quantized" or 32 % weights.num_bits:
        return None
    codes = 32 // weights.num_bits
    if C % codes:
        return f"{C} columns do not fill whole words of {codes} codes"
    if R % codes and not weights.symmetric:
        return f"zero points of {R} rows do not fill whole words of {codes}"
    return None


def _last(linear: Linear, layout: Layout, chosen: Mapping[str, Group]) -> bool:
    """Whether half a block of rows may stand at its end: vLLM merges nothing behind it."""
    members = [name for name in layout.fused_set(linear.name) if name in chosen]
    of_expert = experts_of(linear.name) is not None
    return not fills_whole_blocks(linear.name, members, of_expert=of_expert)


def _lines(
    layout: Layout, misfits: Mapping[str, Misfit], taken: Mapping[str, Misfit]
) -> Iterator[str]:
    """One for each reason: which Linears, how many, and the way out."""
    for misfit in dict.fromkeys(misfits.values()):
        odd = [layout.linears[n] for n, found in misfits.items() if found == misfit]
        along = [layout.linears[n] for n, m in taken.items() if m == misfit and n not in misfits]
        yield (
            _kinds(odd)
            + (f", and with them {_kinds(along)}" if along else "")
            + f": {misfit.why}; {_way_out(misfit)}"
        )


def _kinds(linears: Iterable[Linear]) -> str:
    """ "30 x self_attn.q_proj [576, 576], 30 x mlp.up_proj [1536, 576]"."""
    counts = Counter((_kind(one.name), tuple(one.weight.spec.shape)) for one in linears)
    return ", ".join(
        f"{count} x {name} [{shape[0]}, {shape[1]}]" for (name, shape), count in counts.items()
    )


def _kind(name: str) -> str:
    """A name without the layer's number and the expert's."""
    match = LAYER.match(name)
    return re.sub(r"\.\d+(?=\.)", ".*", name[match.end() :] if match else name)


def _way_out(misfit: Misfit) -> str:
    if not misfit.of_width:
        return "use `--scheme fp8-dynamic`"
    now = misfit.group.weights.group_size if misfit.group.weights is not None else None
    sizes = [n for n in sizes_of(misfit.group) if n != now and (n < 0 or misfit.columns % n == 0)]
    if not sizes:
        return "`--scheme fp8-dynamic` supports any width"
    return f"`--group-size {sizes[0]}` would fit"
