"""The config's groups against the recipe that ckptq wrote beside them: nobody changed one of them.

What a scheme says of activations, and some of what it says of weights, leaves no trace in tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.checkpoint.open import CONFIG
from ckptq.errors import CkptqError
from ckptq.recipes.load import Group, Recipe, load_recipe
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import Subject

RECIPE, RECORD = "recipe.yaml", "ckptq.json"

PARTS = ("weights", "input_activations", "output_activations")

PLANNED = ("strategy",)
"""What the plan may change of attention and cache: one scale a layer where heads differ."""


def check_recipe(subject: Subject) -> Iterator[Finding]:
    """Same groups, same arguments, the same cache; where the recipe is ours and can be read."""
    folder, config = subject.ckpt.path, subject.ckpt.quantization_config
    if config is None or not (folder / RECORD).is_file() or not (folder / RECIPE).is_file():
        return
    try:
        recipe = load_recipe(folder / RECIPE)
    except CkptqError as error:
        yield _differs(RECIPE, str(error)[:200], "the recipe that it was made by")
        return
    if not recipe.handed_over:
        yield from _groups(recipe, config.get("config_groups"))
        yield from _cache(recipe, config.get("kv_cache_scheme"))


def _groups(recipe: Recipe, config: object) -> Iterator[Finding]:
    """The plan may have taken a group's Linears to another one, but it renames none."""
    found = config if isinstance(config, dict) else {}
    for group in recipe.groups:
        ours = found.get(group.name)
        if not isinstance(ours, dict):
            if not group.is_attention:
                yield _differs(f"config_groups.{group.name}", None, "a group of this name")
            continue
        where = f"config_groups.{group.name}"
        yield from _targets(where, group, ours.get("targets"))
        for part in PARTS:
            free = PLANNED if group.is_attention else ()
            yield from _args(f"{where}.{part}", ours.get(part), getattr(group, part), free)


def _targets(where: str, group: Group, found: object) -> Iterator[Finding]:
    """Names that engines know them by may have been added; of attention it is the class."""
    targets = found if isinstance(found, list) else []
    lost = [target for target in group.targets if target not in targets]
    if lost and not group.is_attention:
        yield _differs(f"{where}.targets", targets, f"{lost[0]!r} among them")


def _cache(recipe: Recipe, found: object) -> Iterator[Finding]:
    yield from _args("kv_cache_scheme", found, recipe.attention, PLANNED)


def _args(
    where: str, found: object, wanted: Mapping[str, Any] | None, free: tuple[str, ...]
) -> Iterator[Finding]:
    if not isinstance(found, dict) or wanted is None:
        if bool(found) != bool(wanted):
            yield _differs(where, found, wanted)
        return
    for field in sorted(found.keys() | wanted.keys()):
        ours, theirs = found.get(field), wanted.get(field)
        if field not in free and ours != theirs:
            yield _differs(f"{where}.{field}", ours, theirs)


def _differs(where: str, found: object, wanted: object) -> Finding:
    return finding(
        "recipe-differs", where, file=CONFIG, found=_shown(found),
        wanted=f"{_shown(wanted)}, as in {RECIPE}",
    )  # fmt: skip


def _shown(value: object) -> str:
    return "nothing" if value is None else str(value)[:200]
