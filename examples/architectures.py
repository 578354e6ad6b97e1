"""Configurations of the example models: real architectures, as small as the engines allow.

Every width is a multiple of 128 (INT4 groups, FP8 blocks) and every head is 64 wide (vLLM's CPU
attention wants multiples of 32). Two KV heads, so that two processes hold one each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from task import BOS, EOS, PAD, TOKEN_ID

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 512
"""More rows than the task has tokens, as real models have for their reserved tokens."""

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": TOKEN_ID[BOS],
    "eos_token_id": TOKEN_ID[EOS],
    "pad_token_id": TOKEN_ID[PAD],
}


def llama_config() -> PreTrainedConfig:
    """Llama 3: no norm between k_proj and the cache, so K's heads can differ as V's do."""
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPE, num_hidden_layers=3, intermediate_size=256)


def qwen3_config() -> PreTrainedConfig:
    """Qwen 3: q and k are normed per head, with one weight vector for all heads of a layer."""
    from transformers import Qwen3Config

    return Qwen3Config(**SHAPE, num_hidden_layers=3, intermediate_size=256)


def maverick_config() -> PreTrainedConfig:
    """Like Llama 4 Maverick: no norm on q and k, so their heads can differ in every layer."""
    return llama4_config(qk_norm=False)


def guard_config() -> PreTrainedConfig:
    """Like Llama Guard 4: the same classes and names, every layer dense."""
    return llama4_config(moe_step=0)


def llama4_config(*, moe_step: int = 2, qk_norm: bool = True) -> PreTrainedConfig:
    """Llama 4 as it is served: the multimodal class, of which only the text decoder is trained.

    Dense and expert layers in turn (`moe_step` 2; 0 for dense layers only), every other layer
    without RoPE (and so without norm on q and k) and with attention over the whole context instead
    of a chunk. A chunk is a block of vLLM's CPU cache; temperature tuning starts within a sample.
    """
    from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig

    layers = 4
    text = Llama4TextConfig(
        **SHAPE,
        num_hidden_layers=layers,
        intermediate_size=128,
        intermediate_size_mlp=256,
        num_local_experts=4 if moe_step else 0,
        num_experts_per_tok=1,
        moe_layers=list(range(moe_step - 1, layers, moe_step)) if moe_step else [],
        interleave_moe_layer_step=moe_step,
        use_qk_norm=qk_norm,
        no_rope_layer_interval=2,
        attention_chunk_size=128,
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    vision = Llama4VisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projector_input_dim=128,
        projector_output_dim=128,
        vision_output_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    image, begin, end = VOCAB_SIZE - 1, VOCAB_SIZE - 2, VOCAB_SIZE - 3
    tokens = {name: SHAPE[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
        **tokens,
    )


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A randomly initialised fp32 model of the configuration's class."""
    import transformers

    class_names = {
        "llama": "LlamaForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "llama4": "Llama4ForConditionalGeneration",
    }
    return getattr(transformers, class_names[config.model_type])(config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One model that `make_checkpoint.py` can make."""

    config: Callable[[], PreTrainedConfig]
    steps: int
    """Training steps until the task is learned, with some to spare."""


FAMILIES = ("llama", "llama4", "qwen3")
VARIANTS = ("maverick", "guard")
EXAMPLES = {
    "llama": Example(config=llama_config, steps=600),
    "qwen3": Example(config=qwen3_config, steps=500),
    "llama4": Example(config=llama4_config, steps=550),
    "llama4-maverick": Example(config=maverick_config, steps=550),
    "llama4-guard": Example(config=guard_config, steps=650),
}
