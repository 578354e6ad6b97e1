"""Schemes that end in "-imatrix", ranges of weights with the least error for their inputs, and in
"-refined", with codes and scales of the least error that ckptq finds on top of it."""

from __future__ import annotations

from dataclasses import replace

from ckptq.errors import UsageError
from ckptq.recipes.args import MINMAX
from ckptq.recipes.gptq import FORMATS, check_gptq, with_gptq
from ckptq.recipes.scheme import Group, Recipe
from ckptq.recipes.searched import with_observer
from ckptq.recipes.spelled import changed
from ckptq.recipes.tuned import checked

SUFFIX, REFINED = "-imatrix", "-refined"

STRATEGIES = ("channel", "group", "tensor_group")
"""What llm-compressor's observers weigh."""

PASSES = 4
"""Of coordinate descent; the last two together gain 0.05 dB of a layer's outputs."""


def with_imatrix(recipe: Recipe) -> Recipe:
    """The recipe with ranges chosen by an error in which a column of a weight counts as much as its
    inputs are large, wherever weights take the minimum and maximum of rows or groups.

    UsageError for a recipe without such weights. The name says it: "w4a16-imatrix".
    """
    if recipe.handed_over:
        raise UsageError(
            f"recipe {recipe.name!r} runs in llm-compressor as it is written; name an observer "
            "there"
        )
    groups = _weighed_groups(recipe)
    if groups == recipe.groups:
        raise UsageError(
            f"recipe {recipe.name!r} has no weights for iMatrix: with integer, FP8 or NVFP4 codes, "
            "scales of rows or groups, and the minimum and maximum as ranges"
        )
    return checked(changed(recipe, SUFFIX, groups=groups))


def _weighed_groups(recipe: Recipe) -> tuple[Group, ...]:
    """Its groups, those with such weights changed."""
    return tuple(_weighed(group) for group in recipe.groups)


def _weighed(group: Group) -> Group:
    args = group.weights
    plain = args is not None and args.strategy in STRATEGIES and args.observer in MINMAX
    if args is None or not plain or group.format not in FORMATS:
        return group
    nvfp4 = args.strategy == "tensor_group"
    observer = {"observer": "nvfp4_expanded_imatrix" if nvfp4 else "imatrix_mse"}
    return replace(group, weights=with_observer(args, observer))


def with_descents(recipe: Recipe) -> Recipe:
    """The recipe with GPTQ's codes and scales made better by coordinate descent; where it has no
    GPTQ and no search of ranges, with those too, ranges by iMatrix.

    UsageError for a recipe without scales of rows or groups. The name says it: "w4a16-refined".
    """
    gptq = recipe.gptq
    if gptq is not None and gptq.descents:
        raise UsageError(f"recipe {recipe.name!r} has descents already")
    if gptq is None:
        chosen = with_gptq(replace(recipe, groups=_weighed_groups(recipe)))
        recipe, gptq = replace(chosen, name=recipe.name), chosen.gptq
    assert gptq is not None
    made = changed(recipe, REFINED, gptq=replace(gptq, descents=PASSES))
    check_gptq(made)
    return made
