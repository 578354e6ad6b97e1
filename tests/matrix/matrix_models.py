"""Tiny random checkpoints of each family, as transformers saves them.

Every width is a multiple of 128 (INT4 groups, FP8 blocks). Weights have a deviation of 0.03, so
that logits of different engines can be compared: a wilder random net turns rounding into noise.
Only q and k are larger, because attention that looks everywhere alike would hide their mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny.models import TOKENS, TOWER, causal, image_tokens, llama4

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
    **TOKENS,
}
VISION = TOWER | {"hidden_size": 128, "intermediate_size": 256}


QWEN3_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
MIXTRAL = {"intermediate_size": 256, "num_local_experts": EXPERTS}
LLAMA4 = TEXT | {
    "intermediate_size_mlp": 384,
    "attn_temperature_tuning": False,
    "no_rope_layers": [1, 0],
}
LLAMA4_MOE = LLAMA4 | {
    "intermediate_size": 256,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "moe_layers": [1],
    "interleave_moe_layer_step": 2,
}
"""A dense layer and one of experts, with and without RoPE.

The experts' down_proj is square: a forgotten transpose would show in values only.
"""
LLAMA4_DENSE = LLAMA4 | {"num_local_experts": 0, "moe_layers": [], "interleave_moe_layer_step": 0}
"""Like Llama Guard 4: Llama-4's classes and names, and no experts."""
TOP = {**image_tokens(VOCAB - 1, VOCAB - 2, VOCAB - 3), **TOKENS}

FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "llama": (partial(causal, "Llama", TEXT), "bfloat16"),
    "llama fp32": (partial(causal, "Llama", TEXT), "float32"),
    "qwen3": (partial(causal, "Qwen3", TEXT), "bfloat16"),
    "qwen3-moe": (partial(causal, "Qwen3Moe", TEXT, **QWEN3_MOE), "bfloat16"),
    "mixtral": (partial(causal, "Mixtral", TEXT, **MIXTRAL), "bfloat16"),
    "llama4 dense": (partial(llama4, LLAMA4_DENSE, VISION, **TOP), "bfloat16"),
    "llama4 moe": (partial(llama4, LLAMA4_MOE, VISION, **TOP), "bfloat16"),
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
