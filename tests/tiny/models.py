"""Tiny models as transformers builds them; who calls says how large, and fills the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
"""A vision tower of one layer."""
TOWER_OUT = ("projector_input_dim", "projector_output_dim", "vision_output_dim")


def causal(name: str, sizes: Mapping[str, Any], **changes: Any) -> PreTrainedModel:
    """transformers' `{name}ForCausalLM` with this config."""
    import transformers

    model_class = getattr(transformers, f"{name}ForCausalLM")
    model: PreTrainedModel = model_class(model_class.config_class(**{**sizes, **changes}))
    return model


def llama4(
    text: Mapping[str, Any], tower: Mapping[str, Any] = TOWER, **changes: Any
) -> PreTrainedModel:
    """Multimodal. `changes` are fields of the config's top: the ids of image tokens."""
    import transformers

    vision = {**dict.fromkeys(TOWER_OUT, tower["hidden_size"]), **tower}
    config = transformers.Llama4Config(text_config=dict(text), vision_config=vision, **changes)
    return transformers.Llama4ForConditionalGeneration(config)


def image_tokens(image: int, begin: int, end: int) -> dict[str, int]:
    return {"image_token_index": image, "boi_token_index": begin, "eoi_token_index": end}
