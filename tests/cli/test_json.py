"""The fields of `--json` are those that docs/quantize.md lists, of every command in its table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ckptq import inspect as inspected
from ckptq.convert.permute import Permuted
from ckptq.convert.quantize import QuantizeRequest, plan_of, quantize
from ckptq.convert.run import Result
from ckptq.mend.run import Done, MendRequest, mend
from ckptq.recipes.load import load_scheme
from ckptq.search import result as searched
from ckptq.show.results import plan_data

DOCUMENT = Path(__file__).parents[2] / "docs" / "quantize.md"


def documented() -> dict[str, set[str]]:
    """Command -> all names in its row."""
    section = DOCUMENT.read_text().partition("## `--json`")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in section.splitlines() if row.startswith("| `")]
    return {row[0].strip(" `"): set(re.findall(r"`([a-z0-9_]+)`", row[1])) for row in rows}


def names(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in fields(kind)}


def keys(value: Any, inside: Iterable[str]) -> set[str]:
    """Those of an object, and of the objects in these of its fields."""
    found = set(value)
    for name in inside:
        held = value[name]
        for each in held if isinstance(held, list) else [held]:
            found |= set(each) if isinstance(each, Mapping) else set()
    return found


KINDS = {
    "quantize": (Result,),
    "permute": (Permuted,),
    "inspect": (inspected.Inspection, inspected.Kind),
    "search": (
        *(searched.Found, searched.Chosen, searched.Point, searched.Trial),
        searched.ChosenCache,
    ),
}


@pytest.mark.parametrize("command", KINDS)
def test_every_field_is_documented_and_there_is_no_other(command: str) -> None:
    # what a note in brackets names beside them
    options = {"quantize", "verify"}
    assert documented()[command] - options == names(*KINDS[command])


def test_so_is_what_is_put_together_by_hand(llama: Path, tmp_path: Path) -> None:
    told = documented()
    request = QuantizeRequest(model=llama, recipe=load_scheme("fp8-dynamic"), out=tmp_path / "out")
    plan = plan_data(plan_of(request))
    (first, *_) = plan["units"]
    written = next(iter(first["writes"].values()))
    assert told["quantize --dry-run"] == keys(plan, ["units"]) | set(written)
    out = quantize(request).out
    done = mend(MendRequest(path=out, dry_run=True, headers_only=True)).to_dict()
    assert told["mend"] - {"verify"} == keys(done, ["before"]) | names(Done)
