"""What a plan leaves unquantized: the names for `ignore`, and the reasons for the user.

An engine quantizes every module that a target's class matches and `ignore` does not name, even one
with no tensor on disk (a tied output head) or experts stored as one tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

from ckptq.models.experts import experts_of
from ckptq.models.modules import Layout, Linear
from ckptq.models.witnesses import HEAD
from ckptq.numbered import starred
from ckptq.recipes.scheme import Group

PLAIN = ("embedding", "norm")
"""Kinds that engines never treat as Linears."""

EXPECTED = (*PLAIN, HEAD, "router", "vision tower", "audio tower", "projector", "bias")
"""Reasons that apply to every model and are not reported."""


def left_names(
    layout: Layout, chosen: Collection[str], groups: Collection[Group]
) -> tuple[str, ...]:
    """Every module that an engine would build quantized and that is not, by all engines' names.

    Experts of a layer that were left with all their projections are one pattern. An embedding or a
    norm is named where a target of a group means it by name.
    """
    found: dict[str, None] = {}
    touched = {experts_of(name) for name in chosen}
    for linear in layout.linears.values():
        named = any(group.named.match(linear.name) for group in groups)
        if linear.name in chosen or (linear.kept in PLAIN and not named):
            continue
        experts = experts_of(linear.name)
        if experts is not None and experts not in touched:
            found |= dict.fromkeys(_of_experts(layout, experts, linear.name))
        else:
            found |= dict.fromkeys(layout.witnesses.names_of(linear.name))
    for name in layout.whole_experts:
        found |= dict.fromkeys(_of_whole(layout, name))
    found |= dict.fromkeys(layout.witnesses.unquantized(chosen))
    return tuple(found)


def _of_experts(layout: Layout, experts: str, part: str) -> Iterator[str]:
    yield f"re:{re.escape(experts)}\\..*"
    yield from layout.witnesses.expert_lookups(part)


def _of_whole(layout: Layout, name: str) -> Iterator[str]:
    """Of a 3-D tensor: the pattern of its experts, or the module's own names."""
    experts, _, _ = name.rpartition(".")
    if experts.endswith("experts"):
        yield from _of_experts(layout, experts, name)
    else:
        yield from layout.witnesses.names_of(name)
        yield from layout.witnesses.expert_lookups(name)


def left_alone(layout: Layout, chosen: Collection[str]) -> Iterator[str]:
    """A line for each kind of decoder module that stays unquantized for an unusual reason."""
    kinds: Counter[tuple[str, str]] = Counter()
    for linear in layout.linears.values():
        if linear.name not in chosen and _is_news(layout, linear):
            kinds[starred(linear.name), str(linear.kept)] += 1
    for name, reason in layout.whole_experts.items():
        kinds[starred(name), reason] += 1
    for (pattern, reason), count in kinds.items():
        yield f"{count} x {pattern} left unquantized: {reason}"


def _is_news(layout: Layout, linear: Linear) -> bool:
    told = linear.kept is not None and linear.kept not in EXPECTED
    return told and layout.witnesses.in_layers(linear.name)
