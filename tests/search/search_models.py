"""Tiny models of four layers, and how transformers runs one of which a part is quantized.

Shape letters: S positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny.models import TOKENS, causal
from tiny.words import word_tokenizer
from torch import Tensor

LAYERS = 4
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    **TOKENS,
}


def save_model(family: str, folder: Path, **changes: Any) -> Path:
    """In bf16, the same each time; layers differ in what they do to the hidden states."""
    torch.manual_seed(5)
    model = causal(family, SIZES, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight *= 2.0 ** (1 - index)
    model.to(torch.bfloat16).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    word_tokenizer(words, "<unk>", begin="<s>").save_pretrained(folder)
    return folder


@torch.no_grad()
def kl_of_change(folder: Path, rows: Path, weights: Mapping[str, Tensor]) -> float:
    """Mean KL(source‖changed) over all predicted tokens, where these Linears have other weights:
    by transformers in float32 and torch's own kl_div."""
    ids = [json.loads(line)["input_ids"] for line in rows.read_text().splitlines()]
    source, changed = _logits(folder, ids, {}), _logits(folder, ids, weights)
    total = torch.nn.functional.kl_div(changed, source, log_target=True, reduction="sum")
    return float(total) / len(source)


def _logits(folder: Path, ids: Collection[list[int]], weights: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities of all positions with a next token, in float64."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    for name, weight in weights.items():
        _place(model, name).copy_(weight)
    each = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] for row in ids]
    return torch.cat(each).double().log_softmax(-1)


def _place(model: torch.nn.Module, name: str) -> Tensor:
    """Where the model has the weight of this Linear; of an expert, within the tensor of all."""
    owner, dot, expert = name.partition(".experts.")
    if not dot:
        return model.get_submodule(name).weight
    experts = model.get_submodule(f"{owner}.experts")
    number, projection = expert.split(".")
    if projection == "down_proj":
        return experts.down_proj[int(number)]
    half = experts.gate_up_proj.shape[1] // 2
    rows = slice(half) if projection == "gate_proj" else slice(half, None)
    return experts.gate_up_proj[int(number)][rows]
