"""GPTQ in a recipe: llm-compressor's `GPTQModifier`, and schemes that end in "-gptq"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptq.errors import UsageError
from ckptq.recipes.scheme import DESCENTS, Gptq, Group, Recipe
from ckptq.recipes.spelled import changed, chooser_of

SUFFIX = "-gptq"

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized")
"""What llm-compressor 0.14 chooses codes for; E8M0 scales it has none for."""

ORDERS = (None, False, "static", "weight")
"""Those with which columns are stored in their own order; "weight" is another name of "static"."""


REFITTED = ("channel", "group", "tensor_group")
"""Strategies whose scales belong to one row, which coordinate descent can fit."""

MOST_DESCENTS = 100


def with_gptq(recipe: Recipe) -> Recipe:
    """The recipe with its codes chosen by GPTQ, with llm-compressor's defaults: blocks of 128
    columns, a damping of 0.01, and the columns in the order of their activations.

    UsageError for a recipe without weights, or with a format that GPTQ has no codes for. The name
    says it: "w4a16-gptq".
    """
    if (runs := chooser_of(recipe)) is not None:
        raise UsageError(f"recipe {recipe.name!r} has {runs} already; GPTQ cannot be added to it")
    if not recipe.linears:
        raise UsageError(f"recipe {recipe.name!r} quantizes no weights, so GPTQ has none to choose")
    groups = tuple(_ordered(group) for group in recipe.groups)
    made = changed(recipe, SUFFIX, groups=groups, gptq=Gptq())
    check_gptq(made)
    return made


def check_gptq(recipe: Recipe) -> None:
    """UsageError for a group whose codes GPTQ cannot choose, or not in the order that it names."""
    for group in recipe.linears:
        order = group.weights.actorder if group.weights is not None else None
        if order not in ORDERS:
            raise UsageError(
                f"recipe {recipe.name!r}: group {group.name!r} has actorder {order!r}, which no "
                "engine reads any more; expected static, or null"
            )
        if group.format not in (*FORMATS, "naive-quantized"):
            raise UsageError(
                f"recipe {recipe.name!r}: group {group.name!r} is {group.format}; GPTQ chooses "
                f"codes of {', '.join(FORMATS)}"
            )
        if recipe.refits and group.weights is not None and group.weights.strategy not in REFITTED:
            raise UsageError(
                f"recipe {recipe.name!r}: group {group.name!r} has strategy "
                f"{group.weights.strategy!r}; {DESCENTS} fit scales of {', '.join(REFITTED)}"
            )


def read_gptq(fields: Mapping[str, Any]) -> Gptq:
    """From the modifier's own fields; UsageError for one that has no meaning."""
    block_size = fields.get("block_size", Gptq.block_size)
    dampening_frac = fields.get("dampening_frac", Gptq.dampening_frac)
    if type(block_size) is not int or block_size < 1:
        raise UsageError(f"GPTQModifier.block_size is {block_size!r}; expected a positive number")
    if isinstance(dampening_frac, bool) or not isinstance(dampening_frac, int | float):
        raise UsageError(f"GPTQModifier.dampening_frac is {dampening_frac!r}; expected a number")
    if not 0 <= dampening_frac < float("inf"):
        raise UsageError(
            f"GPTQModifier.dampening_frac is {dampening_frac!r}; expected 0 or more: it is added "
            "to the diagonal of the Hessian, as a share of its mean"
        )
    descents = fields.get(DESCENTS, Gptq.descents)
    if type(descents) is not int or not 0 <= descents <= MOST_DESCENTS:
        raise UsageError(
            f"GPTQModifier.descents is {descents!r}; expected a number up to {MOST_DESCENTS}"
        )
    return Gptq(block_size=block_size, dampening_frac=float(dampening_frac), descents=descents)


def _ordered(group: Group) -> Group:
    if group.weights is None:
        return group
    return replace(group, weights=group.weights.replaced({"actorder": "static"}, ("actorder",)))
