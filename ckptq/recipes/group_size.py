"""`--group-size`: override how many columns share one scale."""

from __future__ import annotations

from dataclasses import replace

from ckptq.errors import UsageError
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Group, Recipe
from ckptq.recipes.spelled import changed

ROW = -1
"""compressed-tensors' size of a group that is the whole row."""

SIZES = (128, 64, 32, ROW)
"""What vLLM 0.32 serves: Marlin's `MARLIN_SUPPORTED_GROUP_SIZES`, for experts too."""


def sizes_of(group: Group) -> tuple[int, ...]:
    """The group sizes that vLLM supports for a group of Linears; empty if the size is fixed.

    Integers have groups of any size, but beside FP8 activations of 128 alone
    (`CompressedTensorsW4A8Fp8`); NVFP4 and the MX formats have their own.
    """
    weights, inputs = group.weights, group.input_activations
    if weights is None or weights.strategy != "group" or weights.type != "int":
        return ()
    return (128,) if inputs is not None and inputs.type == "float" else SIZES


def with_group_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe with `size` columns per scale in every group whose size can be chosen.

    -1 is one scale per row. UsageError for a size that vLLM does not support, and for a recipe
    without such groups. The name includes the size: "w4a16-g64", "w4a16-channel".
    """
    if size not in SIZES:
        raise UsageError(
            f"--group-size {size}: expected 32, 64 or 128 (vLLM's kernels), or -1 for one scale "
            "per row"
        )
    if recipe.handed_over:
        raise UsageError(
            f"recipe {recipe.name!r} runs in llm-compressor exactly as written; set group_size "
            "in the recipe instead of --group-size"
        )
    if not any(map(sizes_of, recipe.groups)):
        raise UsageError(
            f"--group-size {size}: recipe {recipe.name!r} has no integer groups; its scales "
            f"are {_scales(recipe)}"
        )
    groups = tuple(_resized(g, size) if sizes_of(g) else g for g in recipe.groups)
    if groups == recipe.groups:
        return recipe
    return changed(recipe, "-channel" if size == ROW else f"-g{size}", groups=groups)


def _resized(group: Group, size: int) -> Group:
    if size not in sizes_of(group):
        raise UsageError(
            f"--group-size {size}: group {group.name!r} has FP8 activations, with which vLLM "
            "supports only groups of 128"
        )
    weights = group.weights or Args()
    if size == ROW:
        return replace(group, weights=replace(weights, strategy="channel", group_size=None))
    return replace(group, weights=replace(weights, group_size=size))


def _scales(recipe: Recipe) -> str:
    """What shares a scale, of each group of Linears."""
    found = [g.weights for g in recipe.groups if g.weights is not None]
    words = {
        f"one per {w.group_size} columns, fixed by the format"
        if w.group_size
        else f"one per {w.strategy}"
        for w in found
    }
    return " and ".join(sorted(words)) or "for attention only"
