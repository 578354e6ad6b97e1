"""NVFP4's global scale of inputs: 448 * 6 / the largest input, as llm-compressor writes it."""

from collections.abc import Sequence

import pytest
import torch
from calibrate_models import samples_of, token_rows
from calibrate_oneshot import Tensors, _run
from llmcompressor.modifiers.quantization import QuantizationModifier

from ckptq.calibrate.observers import NVFP4_MAX
from ckptq.calibrate.run import calibrate
from ckptq.checkpoint.open import Checkpoint

ROWS = token_rows([24] * 4)
GLOBAL = "input_global_scale"


def global_scales(ckpt: Checkpoint, linears: Sequence[str], **options) -> Tensors:
    options = {"batch_size": 1, "strategy": None} | options
    made = calibrate(ckpt, samples_of(ROWS), inputs=dict.fromkeys(linears, NVFP4_MAX), **options)
    return dict(made.tensors)


def oneshot_globals(ckpt: Checkpoint, as_it_is: bool) -> Tensors:
    """Of a plain `oneshot` with the preset."""
    recipe = QuantizationModifier(
        targets="Linear", scheme="NVFP4", ignore=["lm_head", "re:.*gate$", "re:.*router"]
    )
    return _run(ckpt, recipe, ROWS, as_it_is, (GLOBAL,))


def wrong(ours: Tensors, theirs: Tensors) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, scale in theirs.items()
        if ours[name].dtype != scale.dtype or not torch.equal(ours[name], scale)
    ]


@pytest.fixture(scope="session")
def llama_globals(saved) -> Tensors:
    return oneshot_globals(saved("llama"), as_it_is=True)


def test_global_scales_are_llm_compressors(saved, llama_globals):
    linears = [name.removesuffix(f".{GLOBAL}") for name in llama_globals]
    ours = global_scales(saved("llama"), linears, eager=True)
    assert len(ours) == 4 * 7
    assert len({scale.item() for scale in ours.values()}) > 4
    assert wrong(ours, llama_globals) == []


def test_a_scale_the_other_way_round_is_not_llm_compressors(saved, llama_globals):
    """The twin: what FP8 would store, amax / top, is found in every Linear."""
    linears = [name.removesuffix(f".{GLOBAL}") for name in llama_globals]
    ours = global_scales(saved("llama"), linears, eager=True)
    inverted = {name: 1 / scale for name, scale in ours.items()}
    assert len(wrong(inverted, llama_globals)) == len(llama_globals)
