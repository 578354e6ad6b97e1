"""What llm-compressor's oneshot finds for the same token ids in the same order.

While it calibrates, 0.14.0.1 switches models to eager attention. That goes past its own q hook, so
that q scales stay uninitialised memory, and costs Mixtral its causal mask. Without it all is right.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny.oneshot import calibration

from ckptq.checkpoint.open import Checkpoint

pytest.importorskip("llmcompressor")
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.utils import helpers

Tensors = dict[str, torch.Tensor]


@contextlib.contextmanager
def no_eager_switch() -> Iterator[None]:
    kept = helpers.use_eager_attention
    helpers.use_eager_attention = lambda model: contextlib.nullcontext()
    try:
        yield
    finally:
        helpers.use_eager_attention = kept


def oneshot_attention(
    ckpt: Checkpoint, strategy: str, observer: str, rows: list[list[int]], as_it_is: bool
) -> Tensors:
    """q/k/v scales of an attention group."""
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, observer=observer)
    target = {"llama": "LlamaAttention", "qwen3": "Qwen3Attention"}[ckpt.config["model_type"]]
    group = QuantizationScheme(targets=[target], input_activations=args)
    recipe = QuantizationModifier(config_groups={"attention": group})
    return _run(ckpt, recipe, rows, as_it_is, ("q_scale", "k_scale", "v_scale"))


def oneshot_inputs(ckpt: Checkpoint, rows: list[list[int]], as_it_is: bool) -> Tensors:
    """Input scales of the static FP8 preset."""
    recipe = QuantizationModifier(
        targets="Linear", scheme="FP8", ignore=["lm_head", "re:.*gate$", "re:.*router"]
    )
    return _run(ckpt, recipe, rows, as_it_is, ("input_scale",))


def _run(
    ckpt: Checkpoint,
    recipe: QuantizationModifier,
    rows: list[list[int]],
    as_it_is: bool,
    endings: tuple[str, ...],
) -> Tensors:
    model_class = getattr(transformers, ckpt.config["architectures"][0])
    model = model_class.from_pretrained(ckpt.path, dtype="auto")
    with contextlib.nullcontext() if as_it_is else no_eager_switch():
        oneshot(model=model, recipe=recipe, **calibration(rows))
    state = model.state_dict()
    return {name: state[name].detach().clone() for name in state if name.endswith(endings)}
