"""The plan of a folder under a scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptq.checkpoint.open import open_checkpoint
from ckptq.plan.make import make_plan
from ckptq.plan.unit import Plan
from ckptq.recipes.load import load_scheme
from ckptq.recipes.scheme import Recipe


def plan_of(folder: Path, recipe: str | Recipe = "fp8-dynamic", **options: Any) -> Plan:
    recipe = load_scheme(recipe) if isinstance(recipe, str) else recipe
    return make_plan(open_checkpoint(folder), recipe, **options)
