"""Schemes that end in "-imatrix": ranges of weights with the least error for their inputs."""

from __future__ import annotations

from dataclasses import replace

from ckptq.errors import UsageError
from ckptq.recipes.args import MINMAX
from ckptq.recipes.gptq import FORMATS
from ckptq.recipes.scheme import Group, Recipe
from ckptq.recipes.searched import with_observer
from ckptq.recipes.spelled import changed

SUFFIX = "-imatrix"

STRATEGIES = ("channel", "group", "tensor_group")
"""What llm-compressor's observers weigh."""


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
    groups = weighed_groups(recipe)
    if groups == recipe.groups:
        raise UsageError(
            f"recipe {recipe.name!r} has no weights for iMatrix: with integer, FP8 or NVFP4 codes, "
            "scales of rows or groups, and the minimum and maximum as ranges"
        )
    return changed(recipe, SUFFIX, groups=groups)


def weighed_groups(recipe: Recipe) -> tuple[Group, ...]:
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
