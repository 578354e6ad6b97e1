"""Tiny models of every family, random but shaped so that a wrong scale shows.

V heads differ in size by powers of four, undone in the output projection, so that no two heads of a
layer share a scale.
"""

from collections.abc import Callable
from functools import partial

import torch
import transformers
from tiny.models import TOKENS, TOWER, causal, image_tokens, llama4
from torch import nn
from transformers import PreTrainedModel

from ckptq.text.samples import Samples

HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 4, 2, 16, 128, 4

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    **TOKENS,
}
VISION = TOWER | {"num_hidden_layers": 2}
IMAGES = image_tokens(120, 121, 122)
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
TURNS = ["sliding_attention", "full_attention"] * 2
SLIDING = {
    "sliding_window": 8,
    "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
}

llama = partial(causal, "Llama", TEXT)

LLAMA4 = TEXT | {
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 16,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8,
}
"""Every second layer MoE, one without RoPE, chunks shorter than the text."""

GEMMA3N = TEXT | {
    "intermediate_size": [96] * LAYERS,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "laurel_rank": 4,
    "layer_types": TURNS,
    "activation_sparsity_pattern": [0.0] * LAYERS,
}
"""The last two layers have no keys and values of their own; hidden states are 4-dimensional."""

GEMMA4 = TEXT | {
    "sliding_window": 8,
    "layer_types": TURNS,
    "global_head_dim": 2 * HEAD_DIM,
    "vocab_size_per_layer_input": VOCAB,
}
GLOBAL_HEADS = {
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
}
"""Global layers have one key/value head, of another size, and their keys are their values."""
SHARED_CACHES = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
"""The last two layers read the caches of the first two, one of them over a sliding window."""

MAMBA = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}
JETMOE = {key: n for key, n in TEXT.items() if key not in ("num_attention_heads", "head_dim")}
XGLM = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "ffn_dim": 96,
    "num_layers": 2,
    "attention_heads": HEADS,
}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": HEADS}


def gemma3_multimodal() -> PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config=TEXT | SLIDING, vision_config=VISION, mm_tokens_per_image=4, **IMAGES
    )
    return transformers.Gemma3ForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": partial(llama, tie_word_embeddings=True),
    "qwen3": partial(causal, "Qwen3", TEXT),
    "llama4": partial(llama4, LLAMA4, VISION, **IMAGES),
    "gemma3": partial(causal, "Gemma3", TEXT, **SLIDING),
    "gemma3-multimodal": gemma3_multimodal,
    "mixtral": partial(causal, "Mixtral", TEXT, **MOE),
    "qwen3-moe": partial(
        causal, "Qwen3Moe", TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    # attention sinks, which SDPA cannot compute
    "gpt-oss": partial(causal, "GptOss", TEXT, **MOE, sliding_window=8),
    "gemma3n": partial(causal, "Gemma3n", GEMMA3N),
    # every other layer is linear attention, which caches no keys
    "minimax": partial(
        causal, "MiniMax", TEXT, **MOE, layer_types=["linear_attention", "full_attention"] * 2
    ),
    "gemma4": partial(causal, "Gemma4", GEMMA4, **GLOBAL_HEADS),
    "gemma4-e": partial(causal, "Gemma4", GEMMA4, **SHARED_CACHES),
    # attention beside a mamba mixer; decoder layers that return tuples
    "falcon-h1": partial(causal, "FalconH1", TEXT, **MAMBA),
}


UNCALIBRATED: dict[str, Callable[[], PreTrainedModel]] = {
    # experts of attention: the keys are repeated for each expert of a token
    "jetmoe": partial(causal, "JetMoe", JETMOE, kv_channels=HEAD_DIM, **MOE),
    "xglm": partial(causal, "XGLM", XGLM),
    "bloom": partial(causal, "Bloom", BLOOM),
}
"""Families of which q, k and v cannot be observed head by head."""


def make(family: str) -> PreTrainedModel:
    """A bf16 model of that family, the same each time."""
    torch.manual_seed(20)
    model = (FAMILIES | UNCALIBRATED)[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        for module in model.modules():
            spread_heads(module)
    return model.to(torch.bfloat16)


def spread_heads(attention: nn.Module) -> None:
    """Scale V head h by 4^h and take it back in the output projection."""
    v_proj, o_proj = getattr(attention, "v_proj", None), getattr(attention, "o_proj", None)
    if v_proj is None or o_proj is None or v_proj.weight.shape[0] != KV_HEADS * HEAD_DIM:
        return
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        columns = slice(head * group * HEAD_DIM, (head + 1) * group * HEAD_DIM)
        v_proj.weight[rows] *= 4.0**head
        o_proj.weight[:, columns] /= 4.0**head


def samples_of(rows: list[list[int]], seq_len: int = 24) -> Samples:
    return Samples(tuple(map(tuple, rows)), "test", seq_len, 0)
