"""Names of modules and tensors that differ only in numbers: of layers, of experts."""

from __future__ import annotations

import re

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def starred(name: str) -> str:
    """ "model.layers.3.mlp.experts.17.up_proj" -> "model.layers.*.mlp.experts.*.up_proj"."""
    return NUMBER.sub("*", name)
