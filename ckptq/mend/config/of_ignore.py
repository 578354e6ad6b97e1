"""Repairs of `ignore`: names that are missing, and entries that hit what is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ckptq.engines.vllm import common_merged_name
from ckptq.mend.case import Case
from ckptq.mend.config.edit import edited
from ckptq.mend.repair import Repair
from ckptq.printable import listed
from ckptq.recipes.names import read_names
from ckptq.spec import FLOATS
from ckptq.verify.report import Finding

SHOWN = 3


def add_names(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The modules that are found unquantized, by the names of all engines."""
    modules = [one.tensor for one in found if one.tensor and _is_plain(case, one.tensor)]
    yield from added(case, found[0].code, modules)


def add_unplanned(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The same, for those that a conversion of the source would leave unquantized too."""
    modules = [
        one.tensor
        for one in found
        if one.tensor and _is_plain(case, one.tensor) and not _is_planned(case, one.tensor)
    ]
    yield from added(case, found[0].code, modules)


def added(case: Case, code: str, modules: Sequence[str]) -> Iterator[Repair]:
    """`ignore` with these modules."""
    names: dict[str, None] = {}
    for module in modules:
        names |= dict.fromkeys(case.subject.witnesses.names_of(module))

    def change(own: dict[str, Any]) -> None:
        kept = own.get("ignore") or []
        own["ignore"] = [*kept, *(name for name in names if name not in kept)]

    if modules:
        said = f"ignore: {listed(list(names), SHOWN)} added"
        yield from edited(case, code, said, change, modules[0])


def _is_plain(case: Case, name: str) -> bool:
    """Whether a weight is stored in a dtype of unquantized ones."""
    module = case.subject.modules.get(name)
    codes = module.codes if module is not None else None
    return codes is not None and codes.spec.dtype in FLOATS


def _is_planned(case: Case, name: str) -> bool:
    """Whether a Linear is to be quantized, by the recipe beside, or the source's plan."""
    if case.source is not None:
        return not isinstance(case.plan, str) and name in case.plan.quantized
    recipe = case.recipe
    wanted = recipe.group_of(name, of_class=lambda t: t == "Linear") if recipe else None
    return wanted is not None and case.subject.modules[name].kept is None


def remove_entries(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Entries that match modules with codes and scales on disk."""
    names: list[str] = []
    for name, module in case.subject.modules.items():
        if module.quantized and module.kept is None:
            merged = common_merged_name(name)
            names += [name, *([merged] if merged else [])]
    ignore = (case.draft.ckpt.quantization_config or {}).get("ignore")
    entries = ignore if isinstance(ignore, list) else []
    hits = [e for e in entries if isinstance(e, str) and read_names([e]).match(*names)]

    def change(own: dict[str, Any]) -> None:
        own["ignore"] = [entry for entry in own["ignore"] if entry not in hits]

    if hits:
        said = f"ignore: {listed(hits, SHOWN)} removed, which is quantized on disk"
        yield from edited(case, found[0].code, said, change, found[0].tensor)
