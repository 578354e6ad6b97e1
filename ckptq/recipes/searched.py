"""`--search`: ranges of weights with less error than their minimum and maximum, without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptq.errors import UsageError
from ckptq.recipes.args import MINMAX, Args
from ckptq.recipes.scheme import Group, Recipe
from ckptq.recipes.spelled import changed
from ckptq.recipes.tuned import checked

SUFFIX = "-search"

MSE: Mapping[str, Any] = {"observer": "memoryless_mse"}
BEST: Mapping[str, Mapping[str, Any]] = {
    "nvfp4-pack-quantized": {"observer": "nvfp4_expanded_mse"},
    # a power of two above amax's own, its own, and one below
    "mxfp4-pack-quantized": {
        **MSE,
        "observer_kwargs": {"expand": 2.0, "maxshrink": 1.0, "grid": 4},
    },
    "pack-quantized": MSE,
    "int-quantized": MSE,
    "float-quantized": MSE,
    "mxfp8-quantized": MSE,
}
"""Format -> the observer of llm-compressor's that loses least; docs/formats.md has figures."""


def with_search(recipe: Recipe) -> Recipe:
    """The recipe with a search wherever its weights take the minimum and maximum of a tile.

    UsageError for a recipe without such weights. The name says it: "w4a16-search".
    """
    if recipe.handed_over:
        raise UsageError(
            f"recipe {recipe.name!r} runs in llm-compressor as it is written; name an observer "
            "there instead of --search"
        )
    groups = tuple(_searched(group) for group in recipe.groups)
    if groups == recipe.groups:
        raise UsageError(
            f"--search: recipe {recipe.name!r} has no weights with scales of rows, groups or "
            "blocks that take the minimum and maximum"
        )
    return checked(changed(recipe, SUFFIX, groups=groups))


def _searched(group: Group) -> Group:
    args = group.weights
    if args is None or args.strategy == "tensor" or args.observer not in MINMAX:
        return group
    return replace(group, weights=with_observer(args, BEST.get(group.format or "", MSE)))


def with_observer(args: Args, observer: Mapping[str, Any]) -> Args:
    """The same with another observer, and its arguments."""
    return args.replaced(observer, ("observer", "observer_kwargs"))
