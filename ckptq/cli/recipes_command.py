"""`ckptq recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptq.cli.options import (
    Json,
)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe's YAML.")] = None,
    json: Json = False,
) -> None:
    """List the built-in recipes and compressed-tensors' presets, or show one."""
    from ckptq.recipes.load import describe, load_scheme
    from ckptq.show.results import show_recipe, show_recipes

    if name is None:
        show_recipes(describe(), json)
    else:
        show_recipe(load_scheme(name), json)
