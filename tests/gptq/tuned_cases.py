"""AutoRound in few steps, here and in llm-compressor."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gptq_cases import ROWS, by_oneshot
from tiny.tensors import Tensors

from ckptq.autoround.integers import INTEGERS, register_integers
from ckptq.recipes.load import load_scheme, load_text
from ckptq.recipes.scheme import Recipe

pytest.importorskip("auto_round")


def in_steps(scheme: str, count: int = 6, **more: Any) -> Recipe:
    """A scheme that ends in "-tuned", with so many steps a layer and these fields."""
    text = load_scheme(scheme).text.replace("iters: 200", f"iters: {count}")
    for name, value in more.items():
        default = getattr(load_scheme(scheme).tuning, name)
        old = f"{name}: {'null' if default is None else default}\n"
        assert old in text
        text = text.replace(old, f"{name}: {value}\n")
    return load_text(scheme, text)


def by_oneshot_with_stored_scales(
    source: Path, out: Path, recipe: str, rows: Sequence[Sequence[int]] = ROWS
) -> Tensors:
    """What oneshot writes by a recipe's text, where AutoRound's scales are in BF16, which it stores
    them in, and not in FP16: the one difference that we make."""
    from auto_round.data_type.register import QUANT_FUNC_WITH_DTYPE
    from llmcompressor.modifiers.autoround import base

    register_integers()
    with pytest.MonkeyPatch.context() as patch:
        stored = QUANT_FUNC_WITH_DTYPE[f"{INTEGERS}_sym"]
        patch.setitem(QUANT_FUNC_WITH_DTYPE, "int_sym", stored)
        patch.setattr(base, "AutoRound", partial(base.AutoRound, scale_dtype="bf16"))
        gc.freeze()  # AutoRound collects garbage six times a layer
        try:
            return by_oneshot(source, out, recipe, rows)
        finally:
            gc.unfreeze()
