"""What there is to choose: sets of Linears that share a scheme, the schemes, and what each stores.

Every scheme is planned as `quantize` would plan it, so that what an engine cannot load, merge or
permute is left out here by the same rules, and sizes are those of the tensors that would be
written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError, UsageError
from ckptq.models.experts import experts_of
from ckptq.plan.doubts import vllm_doubts
from ckptq.plan.fit import quantized_together
from ckptq.plan.make import make_plan
from ckptq.plan.unit import Plan
from ckptq.recipes.load import load_scheme
from ckptq.recipes.scheme import Recipe

PLAIN = "bf16"
"""The scheme of what stays as it is, whatever its dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSet:
    """Linears that an engine wants in one scheme: q, k and v, gate and up, a layer's experts."""

    linears: tuple[str, ...]
    weights: int
    """Their number."""
    plain_bytes: int
    """Bytes of what is not quantized, whether or not that may be chosen."""
    nbytes: Mapping[str, int]
    """Scheme -> bytes of codes, scales, zero points and all else that it stores for them."""

    @property
    def name(self) -> str:
        """Its first Linear; of experts, what they lie in."""
        return experts_of(self.linears[0]) or self.linears[0]

    def bits(self, scheme: str) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes[scheme] / self.weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """All that can be chosen for one checkpoint."""

    ckpt: Checkpoint
    plans: Mapping[str, Plan]
    """Scheme -> how it would quantize the whole checkpoint; without PLAIN."""
    sets: tuple[LinearSet, ...]
    """In the order of the checkpoint."""
    told: tuple[str, ...]
    """What cannot be chosen, and why."""

    @property
    def schemes(self) -> tuple[str, ...]:
        return (*self.plans, PLAIN)

    @property
    def weights(self) -> int:
        """Of all sets; embeddings, norms and what no scheme fits do not count."""
        return sum(each.weights for each in self.sets)

    @property
    def rest_bytes(self) -> int:
        """Bytes of the output outside of the sets."""
        scheme, plan = next(iter(self.plans.items()))
        sizes = (each.nbytes.get(scheme, each.plain_bytes) for each in self.sets)
        return plan.write_bytes - sum(sizes)


def find_candidates(
    ckpt: Checkpoint, schemes: Sequence[str], ignore: Sequence[str] = ()
) -> Candidates:
    """Sets and what each scheme stores for them. Headers only.

    A scheme that cannot be planned, or that vLLM would not load where it loads another, is left
    out. UsageError for one that cannot be mixed with others; PlanError where none is left.
    """
    recipes = [_mixable(load_scheme(name)) for name in schemes if name.lower() != PLAIN]
    if not recipes:
        raise UsageError(f"--schemes: name a scheme beside {PLAIN}; `ckptq recipes` lists them")
    plans: dict[str, Plan] = {}
    told: list[str] = []
    for recipe in recipes:
        try:
            plans[recipe.name] = make_plan(ckpt, recipe, ignore=ignore)
        except PlanError as error:
            told.append(f"{recipe.name} is no candidate: {error}")
    for name, doubts in _doubted(plans).items():
        told.append(f"{name} is no candidate: {'; '.join(doubts)}")
        del plans[name]
    if not plans:
        raise PlanError("\n".join(told))
    told += [f"{name}: {line}" for name, plan in plans.items() for line in plan.told]
    sets = tuple(_sets(plans, PLAIN in map(str.lower, schemes)))
    return Candidates(ckpt=ckpt, plans=plans, sets=sets, told=tuple(told))


def _mixable(recipe: Recipe) -> Recipe:
    """UsageError for a scheme that is more than a group of Linears."""
    if recipe.handed_over or recipe.conversion is not None or not recipe.linears:
        raise UsageError(f"--schemes {recipe.name}: quantizes no Linears that others could join")
    if recipe.runs_layers:
        raise UsageError(
            f"--schemes {recipe.name}: quantizes weights by their inputs, all at once; search with "
            "the scheme without that"
        )
    if recipe.attention is not None:
        raise UsageError(
            f"--schemes {recipe.name}: quantizes the KV cache too; search with a scheme of weights"
        )
    return recipe


def _doubted(plans: Mapping[str, Plan]) -> dict[str, list[str]]:
    """Schemes that vLLM would not load, and why; what it says of every scheme is the model's."""
    doubts = {name: list(vllm_doubts(plan)) for name, plan in plans.items()}
    shared = set.intersection(*map(set, doubts.values())) if doubts else set()
    own = {name: [line for line in lines if line not in shared] for name, lines in doubts.items()}
    return {name: lines for name, lines in own.items() if lines}


def _sets(plans: Mapping[str, Plan], plain: bool) -> Iterator[LinearSet]:
    """The sets that some scheme quantizes, each with the schemes that quantize all of it."""
    layout = next(iter(plans.values())).layout
    stored = {name: _stored(plan) for name, plan in plans.items()}
    linears = [n for n in layout.linears if any(n in plan.quantized for plan in plans.values())]
    together = quantized_together(layout, linears)
    done: set[str] = set()
    for first in linears:
        if first in done:
            continue
        members = tuple(together[first])
        done |= set(members)
        specs = [layout.linears[name].weight.spec for name in members]
        sizes = {
            scheme: sum(map(found.__getitem__, members))
            for scheme, found in stored.items()
            if all(name in found for name in members)
        }
        plain_bytes = sum(spec.nbytes for spec in specs)
        if plain or not sizes:
            sizes[PLAIN] = plain_bytes
        yield LinearSet(
            linears=members,
            weights=sum(spec.shape[0] * spec.shape[1] for spec in specs),
            plain_bytes=plain_bytes,
            nbytes=sizes,
        )


def _stored(plan: Plan) -> dict[str, int]:
    """Linear -> bytes of all tensors of its format, of those that the plan quantizes."""
    found: dict[str, int] = {}
    for unit in plan.units:
        for part in unit.parts:
            found[part.linear.name] = sum(spec.nbytes for spec in part.writes.values())
        for name, spec in unit.scales.items():
            linear = name.rpartition(".")[0]
            if linear in found:
                found[linear] += spec.nbytes
    return found
