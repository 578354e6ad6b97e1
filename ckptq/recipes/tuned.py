"""AutoRound in a recipe: llm-compressor's `AutoRoundModifier`, and schemes that end in "-tuned"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptq.errors import UsageError
from ckptq.recipes.args import MINMAX
from ckptq.recipes.scheme import Recipe, Tuning
from ckptq.recipes.spelled import AUTOROUND, changed, chooser_of

SUFFIX = "-tuned"

FORMATS = (
    *("pack-quantized", "int-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
"""Whose codes and scales AutoRound 0.15 tunes so that they can be stored; of FP8 it tunes scales
alone, and those in FP16."""

STRATEGIES = ("channel", "group", "tensor_group")


def with_tuning(recipe: Recipe) -> Recipe:
    """The recipe with its codes and scales tuned by AutoRound, in as many steps as that takes by
    default. torch.compile is off: bits would depend on its version.

    UsageError for a recipe without weights, or with a format that AutoRound does not tune. The name
    says it: "w4a16-tuned".
    """
    if (runs := chooser_of(recipe)) is not None:
        raise UsageError(f"recipe {recipe.name!r} has {runs} already; AutoRound cannot be added")
    return checked(changed(recipe, SUFFIX, tuning=Tuning(enable_torch_compile=False)))


def checked(recipe: Recipe) -> Recipe:
    """The recipe. UsageError for one that AutoRound is to tune, with a group that it cannot."""
    if recipe.tuning is None:
        return recipe
    if not recipe.linears:
        raise UsageError(f"recipe {recipe.name!r} quantizes no weights, so AutoRound has none")
    for group in recipe.linears:
        said, args = f"recipe {recipe.name!r}: group {group.name!r}", group.weights
        if group.format not in (*FORMATS, "naive-quantized") or args is None:
            raise UsageError(f"{said} is {group.format}; AutoRound tunes {', '.join(FORMATS)}")
        if args.strategy not in STRATEGIES:
            raise UsageError(
                f"{said} has strategy {args.strategy!r}; AutoRound tunes scales of "
                f"{', '.join(STRATEGIES)}"
            )
        if args.observer not in MINMAX:
            raise UsageError(
                f"{said} has observer {args.observer!r}; AutoRound tunes ranges itself, from the "
                "minimum and maximum"
            )
        if args.actorder:
            raise UsageError(f"{said} has actorder {args.actorder!r}, which AutoRound has not")
    return recipe


def read_tuning(fields: Mapping[str, Any]) -> Tuning:
    """From the modifier's own fields; UsageError for one that has no meaning here."""
    made = Tuning(**{name: fields[name] for name in Tuning.__dataclass_fields__ if name in fields})
    for name, least in (("iters", 1), ("batch_size", 1)):
        value = getattr(made, name)
        if type(value) is not int or value < least:
            raise UsageError(f"{AUTOROUND}.{name} is {value!r}; expected {least} or more")
    if made.lr is not None and not made.lr > 0:
        raise UsageError(f"{AUTOROUND}.lr is {made.lr!r}; expected more than 0, or null")
    if fields.get("device_ids") is not None:
        raise UsageError(
            f"{AUTOROUND}.device_ids is {fields['device_ids']!r}; one layer is in memory, on the "
            "device that --device names"
        )
    return made
