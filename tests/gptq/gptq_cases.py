"""Tiny models whose channels differ, and what llm-compressor's oneshot makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny.models import TOKENS, causal
from tiny.oneshot import calibration
from tiny.rows import token_rows, write_rows
from tiny.tensors import Tensors, tensors_in

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.output import RunOptions
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme
from ckptq.recipes.scheme import Recipe

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    **TOKENS,
}
MOE = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}

pytest.importorskip("llmcompressor")  # GPTQ is its arithmetic

ROWS = token_rows([48] * 12)


def save(folder: Path, family: str = "Llama", dtype: torch.dtype = torch.bfloat16, **changes: Any):
    """A random model with channels of very different size, so that Hessians are far from even."""
    torch.manual_seed(0)
    model = causal(family, SIZES, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.exp(torch.randn_like(parameter)))
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


def converted(
    source: Path,
    out: Path,
    recipe: Recipe | str,
    rows: Sequence[Sequence[int]] = ROWS,
    note=lambda line: None,
    **options: Any,
) -> Path:
    """What `ckptq quantize` writes for these rows, one a batch."""
    data = write_rows(out.parent / "rows.jsonl", rows)
    wanted = CalibrationRequest(data=str(data), samples=len(rows), seq_len=len(rows[0]))
    recipe = load_scheme(recipe) if isinstance(recipe, str) else recipe
    options.setdefault("options", RunOptions(device="cpu", workers=1))
    request = QuantizeRequest(model=source, recipe=recipe, out=out, calibration=wanted, **options)
    quantize(request, note=note)
    return out


def each_once(source: Path, folder: Path) -> Callable[[str], Path]:
    """Scheme -> what `converted` makes by it, which nobody may write to."""
    return cache(lambda scheme: converted(source, folder / scheme, scheme))


def by_oneshot(
    source: Path, out: Path, recipe: str, rows: Sequence[Sequence[int]] = ROWS
) -> Tensors:
    """What oneshot writes by a recipe's text for the same rows, one a batch.

    0.14.0.1 calibrates with eager attention, whose outputs differ from SDPA's in a last bit.
    """
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.utils import helpers

    config = json.loads((source / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(source, dtype="auto")
    linearize_moe(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "use_eager_attention", lambda model: nullcontext())
        oneshot(
            model=model,
            recipe=recipe,
            moe_calibrate_all_experts=False,
            **calibration(rows),
        )
        model.save_pretrained(out)
    return tensors_in(out)


def digests(folder: Path) -> dict[str, str]:
    """Every file of an output, by its digest."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}
