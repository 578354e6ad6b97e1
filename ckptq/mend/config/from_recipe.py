"""What config.json has lost or contradicts, as the recipe.yaml beside it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from ckptq.mend.case import Case
from ckptq.mend.config.attention_class import attention_class
from ckptq.mend.config.edit import edited, with_quantization
from ckptq.mend.repair import Repair
from ckptq.plan.left import PLAIN
from ckptq.plan.permutable import permutable
from ckptq.recipes.edited import groups_of, replace_cache
from ckptq.recipes.scheme import PARTS, Group, Recipe
from ckptq.verify.report import Finding
from ckptq.verify.subject import Subject

SAID = "as recipe.yaml says"


def restore_fields(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Formats, arguments and cache scheme of the groups that config.json has, and lost groups."""
    if (recipe := case.recipe) is not None:
        code = found[0].code
        said = f"config groups and kv_cache_scheme restored, {SAID}"
        yield from edited(case, code, said, partial(_restored, case, recipe, targets=False))


def restore_targets(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The same with the groups' targets, and without groups that the recipe does not have."""
    if (recipe := case.recipe) is not None:
        said = f"config groups restored with their targets, {SAID}"
        yield from edited(case, found[0].code, said, partial(_restored, case, recipe, targets=True))


def write_anew(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """A whole quantization_config, for a checkpoint that has lost its own."""
    if (recipe := case.recipe) is None:
        return
    made: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": version("compressed-tensors"),
        "quantization_status": "compressed",
        "format": _overall(recipe),
        "ignore": _left(case.subject),
        "config_groups": {},
    }
    _restored(case, recipe, made, targets=True)
    config = with_quantization(case.draft.ckpt, made)
    said = f"quantization_config written, {SAID}; ignore holds what is not quantized on disk"
    yield Repair(code=found[0].code, where=None, said=said, config=config)


def _overall(recipe: Recipe) -> str:
    formats = {group.format for group in recipe.linears}
    return str(formats.pop()) if len(formats) == 1 else "mixed-precision" if formats else "dense"


def _left(subject: Subject) -> list[str]:
    """Modules with weights of their own that engines would quantize."""
    names: dict[str, None] = {}
    for name, module in subject.modules.items():
        if not module.quantized and module.kept not in PLAIN:
            names |= dict.fromkeys(subject.witnesses.names_of(name))
    done = [name for name, module in subject.modules.items() if module.quantized]
    names |= dict.fromkeys(subject.witnesses.unquantized(done))
    return list(names)


def _restored(case: Case, recipe: Recipe, own: dict[str, Any], *, targets: bool) -> None:
    entries = groups_of(own)
    names = {group.name: group for group in recipe.groups}
    derived = {name: _derived(name, recipe) for name in entries}
    for name, entry in entries.items():
        group = derived[name]
        if group is None:
            if targets:
                del own["config_groups"][name]
            continue
        _refill(entry, group)
        if targets and not group.is_attention and name in names:
            entry["targets"] = list(group.targets)
    for name, group in names.items():
        if not any(made is not None and made.name == name for made in derived.values()):
            own.setdefault("config_groups", {})[name] = _entry(case, group)
    if isinstance(own.get("config_groups"), dict):
        items = own["config_groups"].items()
        own["config_groups"] = dict(sorted(items, key=lambda item: _is_attention(item[1])))
    own["format"] = own.get("format") if _overall(recipe) == "dense" else _overall(recipe)
    kv = recipe.attention
    replace_cache(own, kv.to_dict() if kv is not None else None)


def _is_attention(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("weights") is None


def _derived(name: str, recipe: Recipe) -> Group | None:
    """The group of the recipe that an entry of config.json was made from."""
    for group in recipe.groups:
        if name in (group.name, f"{group.name}_qkv"):
            return permutable(group, name)
    return None


def _refill(entry: dict[str, Any], group: Group) -> None:
    """The recipe's fields in the place of the entry's; others go."""
    wanted = group.to_dict()
    for field in ("format", *PARTS):
        entry[field] = wanted[field]
    for field in [name for name in entry if name not in wanted]:
        del entry[field]


def _entry(case: Case, group: Group) -> dict[str, Any]:
    made = group.to_dict()
    if group.is_attention:
        made["targets"] = [attention_class(case.draft.ckpt) or "Attention"]
    return made
