"""config.json against the recipe that ckptq wrote beside it: whether somebody changed one of them.

How inputs are quantized on the fly leaves no trace in tensors, so nothing else would notice. Each
Linear is compared by what both say of it, whatever the groups and their targets are called; fields
that no engine reads (observers) are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptq.checkpoint.open import CONFIG
from ckptq.errors import CkptqError
from ckptq.plan.permutable import permutable
from ckptq.printable import listed
from ckptq.recipes.args import Args
from ckptq.recipes.load import load_written
from ckptq.recipes.scheme import PARTS, Group, Recipe
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import Subject

RECIPE, RECORD = "recipe.yaml", "ckptq.json"

READ = ("num_bits", "type", "symmetric", "strategy", "columns", "block_structure", "dynamic")
"""What engines read of `Args`; a group of -1 columns is none."""

PER_HEAD, PER_TENSOR = "attn_head", "tensor"

Difference = tuple[str, object, object]
"""(field, what config.json says, what the recipe says)"""


def check_recipe(subject: Subject) -> Iterator[Finding]:
    """A finding for each field that differs. Nothing where the recipe is not ckptq's, cannot be
    read, or was carried out by llm-compressor, which writes a config of its own."""
    recipe = written_recipe(subject.ckpt.path) if subject.declared.present else None
    if recipe is None or recipe.handed_over:
        return
    yield from _linears(subject, recipe)
    for field, found, wanted in _cache(subject.declared.kv_cache_scheme, recipe.attention):
        yield _differs(field, _shown(found), wanted)


def written_recipe(folder: Path) -> Recipe | None:
    """The recipe.yaml that ckptq wrote into a checkpoint; None where that is another tool's, or
    cannot be read."""
    if not all((folder / name).is_file() for name in (RECIPE, RECORD)):
        return None
    try:
        return load_written(folder / RECIPE)
    except CkptqError:
        return None


def _linears(subject: Subject, recipe: Recipe) -> Iterator[Finding]:
    """Those that are quantized, by both. All others are judged by what is stored of them."""
    unlike: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, module in subject.modules.items():
        wanted = recipe.group_of(name, of_class=lambda target: target == "Linear")
        if module.quantized and module.group is not None and wanted is not None:
            for field, ours, theirs in _group(module.group, permutable(wanted, module.group.name)):
                unlike[f"config_groups.{field}", _shown(ours), _shown(theirs)].append(name)
    for (field, found, wanted_value), names in unlike.items():
        yield _differs(field, f"{found}, for {listed(names, 1)}", wanted_value)


def _group(found: Group, wanted: Group) -> Iterator[Difference]:
    for part in PARTS:
        yield from _args(f"{found.name}.{part}", getattr(found, part), getattr(wanted, part))


def _cache(found: Args | None, wanted: Args | None) -> Iterator[Difference]:
    """The plan makes scales per tensor of those per head where layers differ in their heads."""
    for field, ours, theirs in _args("kv_cache_scheme", found, wanted):
        if (ours, theirs) != (PER_TENSOR, PER_HEAD):
            yield field, ours, theirs


def _args(where: str, found: Args | None, wanted: Args | None) -> Iterator[Difference]:
    if found is None or wanted is None:
        if found is not wanted:
            yield where, found, wanted
    elif not found.odd:  # else that is a finding of its own
        for field in READ:
            ours, theirs = getattr(found, field), getattr(wanted, field)
            if ours != theirs:
                yield f"{where}.{'group_size' if field == 'columns' else field}", ours, theirs


def _shown(value: Any) -> str:
    said = value.to_dict() if isinstance(value, Args) else value
    return "nothing" if said is None else str(said)[:200]


def _differs(field: str, found: str, wanted: object) -> Finding:
    return finding(
        "recipe-differs", field, file=CONFIG, found=found,
        wanted=f"{_shown(wanted)}, as in {RECIPE}",
    )  # fmt: skip
