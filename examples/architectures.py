"""Configurations of the example models: real architectures, as small as the engines allow.

Every width is a multiple of 128 (INT4 groups, FP8 blocks) and every head is 64 wide (vLLM's CPU
attention wants multiples of 32). Two KV heads, so that two processes hold one each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from task import BOS, EOS, PAD, TOKEN_ID

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 512
"""More rows than the task has tokens, as real models have for their reserved tokens."""

SHAPE = {
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


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A randomly initialised fp32 model of the configuration's class."""
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM

    classes = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}
    return classes[config.model_type](config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One model that `make_checkpoint.py` can make."""

    config: Callable[[], PreTrainedConfig]
    steps: int
    """Training steps until the task is learned, with some to spare."""


EXAMPLES = {
    "llama": Example(config=llama_config, steps=450),
    "qwen3": Example(config=qwen3_config, steps=450),
}
