"""Names of modules and tensors that differ only in numbers: of layers, of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def starred(name: str) -> str:
    """ "model.layers.3.mlp.experts.17.up_proj" -> "model.layers.*.mlp.experts.*.up_proj"."""
    return NUMBER.sub("*", name)


def unstarred(pattern: str, numbers: Iterable[str], rest: str = "*") -> str:
    """The pattern with numbers in the place of its `*`, in their order, and `rest` behind them."""
    left = iter(numbers)
    return re.sub(r"\*", lambda star: next(left, rest), pattern)
