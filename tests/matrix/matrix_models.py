"""Tiny random checkpoints of each family, as transformers saves them.

Every width is a multiple of 128 (INT4 groups, FP8 blocks). Weights have a deviation of 0.03, so
that logits of different engines can be compared: a wilder random net turns rounding into noise.
Only q and k are larger, because attention that looks everywhere alike would hide their mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EXPERTS, VOCAB = 4, 512
QK = ("q_proj.weight", "k_proj.weight")
DEVIATION, QK_DEVIATION = 0.03, 0.1

TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
    "vision_output_dim": 128,
}


def llama() -> PreTrainedModel:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def qwen3() -> PreTrainedModel:
    import transformers

    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT))


def qwen3_moe() -> PreTrainedModel:
    import transformers

    config = transformers.Qwen3MoeConfig(
        **TEXT, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=256
    )
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> PreTrainedModel:
    import transformers

    text = TEXT | {"intermediate_size": 256, "num_local_experts": EXPERTS}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**text))


def llama4_moe() -> PreTrainedModel:
    """Multimodal, a dense layer and one of experts, with and without RoPE.

    The experts' down_proj is square: a forgotten transpose would show in values only.
    """
    return _llama4(
        intermediate_size=256,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        moe_layers=[1],
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0],
    )


def llama4_dense() -> PreTrainedModel:
    """Like Llama Guard 4: Llama-4's classes and names, and no experts."""
    return _llama4(
        num_local_experts=0, moe_layers=[], interleave_moe_layer_step=0, no_rope_layers=[1, 0]
    )


def _llama4(**changes: Any) -> PreTrainedModel:
    import transformers

    text = TEXT | {"intermediate_size_mlp": 384, "attn_temperature_tuning": False} | changes
    tokens = {key: TEXT[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.Llama4Config(
        text_config=text,
        vision_config=VISION,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
        **tokens,
    )
    return transformers.Llama4ForConditionalGeneration(config)


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "llama": (llama, "bfloat16"),
    "llama fp32": (llama, "float32"),
    "qwen3": (qwen3, "bfloat16"),
    "qwen3-moe": (qwen3_moe, "bfloat16"),
    "mixtral": (mixtral, "bfloat16"),
    "llama4 dense": (llama4_dense, "bfloat16"),
    "llama4 moe": (llama4_moe, "bfloat16"),
}
"""Name -> how it is built, and its dtype."""


def save_source(family: str, folder: Path) -> Path:
    """Write the checkpoint of a family: the same bytes each time."""
    import torch

    build, dtype = FAMILIES[family]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, QK_DEVIATION if name.endswith(QK) else DEVIATION)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _fill(parameter: torch.Tensor, deviation: float) -> None:
    """Normal weights; vectors (norms) around what they were, so that no two are alike."""
    import torch

    noise = torch.randn_like(parameter) * deviation
    parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
