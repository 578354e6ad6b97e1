"""Schemes that quantize nothing: quantized sources are written in another form."""

from __future__ import annotations

from collections.abc import Mapping

from ckptq.recipes.scheme import DEQUANTIZE, REPACK, REPACK_NVFP4, Recipe

REWRITTEN: Mapping[str, str] = {
    DEQUANTIZE: "A quantized source's weights, dequantized into the dtype of its config.json.",
    REPACK: "A quantized source's codes and scales as they are, in compressed-tensors' layout.",
    REPACK_NVFP4: "As repack, with MXFP4 cast to NVFP4: exact where NVFP4's scales reach.",
}
"""Name -> what it does."""


def rewriting(name: str) -> Recipe:
    """The recipe of one of them; the groups of `repack` follow from the source."""
    return Recipe(name=name, conversion=name, text=f"# {REWRITTEN[name]}\n")
