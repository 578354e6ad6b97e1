"""What was chosen, as one recipe: a group for each scheme, with the layers that it is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ckptq.models.experts import experts_of
from ckptq.models.family import LAYER
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Group, Recipe
from ckptq.recipes.spelled import spelled
from ckptq.search.candidates import PLAIN, Candidates


def mixed_recipe(
    name: str,
    candidates: Candidates,
    chosen: Mapping[str, str],
    ignore: Sequence[str],
    cache: Args | None = None,
) -> Recipe:
    """The recipe in llm-compressor's dialect. `chosen`: set -> scheme; `ignore` was asked for.

    Groups are those of the schemes' own plans, so that q, k and v that an engine permutes keep what
    the plan gave them. What stays as it is, is ignored by name.
    """
    linears = {
        scheme: [
            linear
            for each in candidates.sets
            if chosen[each.name] == scheme
            for linear in each.linears
        ]
        for scheme in candidates.schemes
    }
    kept = [entry for plan in candidates.plans.values() for entry in plan.recipe.ignore]
    recipe = Recipe(
        name=name,
        groups=tuple(_groups(candidates, linears)),
        ignore=tuple(dict.fromkeys([*kept, *ignore, *patterns(linears[PLAIN])])),
        kv_cache_scheme=cache,
        text="",
    )
    return replace(recipe, text=spelled(recipe))


def _groups(candidates: Candidates, linears: Mapping[str, Sequence[str]]) -> Iterator[Group]:
    for scheme, plan in candidates.plans.items():
        mine = set(linears[scheme])
        for number, group in enumerate(plan.recipe.linears):
            members = [name for name in plan.groups[group.name] if name in mine]
            if members:
                name = scheme if not number else f"{scheme}-{number}"
                yield replace(group, name=name, targets=tuple(patterns(members)))


def patterns(linears: Iterable[str]) -> Iterator[str]:
    """Targets that match these Linears alone, as few as can be read.

    Example: "re:model\\.layers\\.(0|3)\\.self_attn\\.(q_proj|k_proj)$". All experts of a layer are
    in one set, so any expert's number will do.
    """
    layers: dict[tuple[str, str, str], dict[int, None]] = {}
    for name in linears:
        layers.setdefault(_kind(name), {})[_index(name)] = None
    locals_: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for (prefix, parent, local), found in layers.items():
        locals_.setdefault((prefix, parent, tuple(sorted(found))), []).append(local)
    for (prefix, parent, indices), names in locals_.items():
        where = f"{re.escape(prefix)}\\.{_either(map(str, indices))}\\." if prefix else ""
        yield f"re:{where}{parent}{_either(names)}$"


def _kind(name: str) -> tuple[str, str, str]:
    """The list of layers; as patterns what lies between, with its last dot, and the last word."""
    match, experts = LAYER.match(name), experts_of(name)
    start = match.end() if match is not None else 0
    parent, dot, local = name[start:].rpartition(".")
    between = re.escape(parent + dot)
    if experts is not None:
        inner = name[len(experts) + 1 : len(name) - len(dot + local)].partition(".")
        between = re.escape(experts[start:]) + r"\.\d+" + re.escape("".join(inner[1:])) + r"\."
    return match["prefix"] if match is not None else "", between, re.escape(local)


def _index(name: str) -> int:
    match = LAYER.match(name)
    return int(match["index"]) if match is not None else 0


def _either(words: Iterable[str]) -> str:
    found = list(words)
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"
