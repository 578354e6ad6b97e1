"""Schemes that end in "-refined": the codes and scales of least error that ckptq finds by text."""

from __future__ import annotations

from dataclasses import replace

from ckptq.errors import UsageError
from ckptq.recipes.gptq import check_gptq, with_gptq
from ckptq.recipes.imatrix import weighed_groups
from ckptq.recipes.scheme import Recipe
from ckptq.recipes.spelled import changed

SUFFIX = "-refined"

DESCENTS = 4
"""Passes; the fifth gains less than 0.02 dB."""


def with_descents(recipe: Recipe) -> Recipe:
    """The recipe with GPTQ's codes and scales made better by coordinate descent; where it has no
    GPTQ and no search of ranges, with those too, ranges by iMatrix.

    UsageError for a recipe without scales of rows or groups. The name says it: "w4a16-refined".
    """
    gptq = recipe.gptq
    if gptq is not None and gptq.descents:
        raise UsageError(f"recipe {recipe.name!r} has descents already")
    if gptq is None:
        chosen = with_gptq(replace(recipe, groups=weighed_groups(recipe)))
        recipe, gptq = replace(chosen, name=recipe.name), chosen.gptq
    assert gptq is not None
    made = changed(recipe, SUFFIX, gptq=replace(gptq, descents=DESCENTS))
    check_gptq(made)
    return made
