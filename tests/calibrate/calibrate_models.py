"""Tiny models of every family, random but shaped so that a wrong scale shows.

V heads differ in size by powers of four, undone in the output projection, so that no two heads of a
layer share a scale.
"""

from collections.abc import Callable

import torch
import transformers
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
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}


def llama(**changes) -> PreTrainedModel:
    config = transformers.LlamaConfig(**(TEXT | changes))
    return transformers.LlamaForCausalLM(config)


def llama_tied() -> PreTrainedModel:
    return llama(tie_word_embeddings=True)


def qwen3() -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT))


def llama4() -> PreTrainedModel:
    """Multimodal; every second layer MoE, one without RoPE, chunks shorter than the text."""
    text = TEXT | {
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 1, 0],
        "attention_chunk_size": 16,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 8,
    }
    vision = VISION | {
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    config = transformers.Llama4Config(
        text_config=text,
        vision_config=vision,
        boi_token_index=121,
        eoi_token_index=122,
        image_token_index=120,
    )
    return transformers.Llama4ForConditionalGeneration(config)


SLIDING = {
    "sliding_window": 8,
    "layer_types": [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ],
}


def gemma3() -> PreTrainedModel:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT, **SLIDING))


def gemma3_multimodal() -> PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config=TEXT | SLIDING,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        **TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    """Attention sinks, which SDPA cannot compute."""
    config = transformers.GptOssConfig(
        **TEXT, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    )
    return transformers.GptOssForCausalLM(config)


def gemma3n() -> PreTrainedModel:
    """The last two layers have no keys and values of their own; hidden states are 4-dimensional."""
    config = transformers.Gemma3nTextConfig(
        **(TEXT | {"intermediate_size": [96] * LAYERS}),
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_kv_shared_layers=2,
        sliding_window=8,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * LAYERS,
    )
    return transformers.Gemma3nForCausalLM(config)


def minimax() -> PreTrainedModel:
    """Every other layer is linear attention, which caches no keys."""
    config = transformers.MiniMaxConfig(
        **TEXT,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"] * 2,
    )
    return transformers.MiniMaxForCausalLM(config)


def gemma4() -> PreTrainedModel:
    """Global layers have one key/value head, of another size, and their keys are their values."""
    config = transformers.Gemma4TextConfig(
        **TEXT,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        global_head_dim=2 * HEAD_DIM,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=0,
    )
    return transformers.Gemma4ForCausalLM(config)


def gemma4_e() -> PreTrainedModel:
    """The last two layers read the caches of the first two, one of them over a sliding window."""
    config = transformers.Gemma4TextConfig(
        **TEXT,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        global_head_dim=2 * HEAD_DIM,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
    )
    return transformers.Gemma4ForCausalLM(config)


def jetmoe() -> PreTrainedModel:
    """Experts of attention: the keys are repeated for each expert of a token."""
    known = {
        key: size for key, size in TEXT.items() if key not in ("num_attention_heads", "head_dim")
    }
    config = transformers.JetMoeConfig(
        **known,
        kv_channels=HEAD_DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.JetMoeForCausalLM(config)


def falcon_h1() -> PreTrainedModel:
    """Attention beside a mamba mixer; decoder layers that return tuples."""
    config = transformers.FalconH1Config(
        **TEXT, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1
    )
    return transformers.FalconH1ForCausalLM(config)


def xglm() -> PreTrainedModel:
    """Attention of its own."""
    config = transformers.XGLMConfig(
        vocab_size=VOCAB, d_model=64, ffn_dim=96, num_layers=2, attention_heads=HEADS
    )
    return transformers.XGLMForCausalLM(config)


def bloom() -> PreTrainedModel:
    """Decoder layers that return tuples."""
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=HEADS)
    return transformers.BloomForCausalLM(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": llama_tied,
    "qwen3": qwen3,
    "llama4": llama4,
    "gemma3": gemma3,
    "gemma3-multimodal": gemma3_multimodal,
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "gpt-oss": gpt_oss,
    "gemma3n": gemma3n,
    "minimax": minimax,
    "gemma4": gemma4,
    "gemma4-e": gemma4_e,
    "falcon-h1": falcon_h1,
}


UNCALIBRATED: dict[str, Callable[[], PreTrainedModel]] = {
    "jetmoe": jetmoe,
    "xglm": xglm,
    "bloom": bloom,
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


def token_rows(lengths: list[int], seed: int = 7) -> list[list[int]]:
    """Random token ids, below those that stand for images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 110, (n,), generator=generator).tolist() for n in lengths]


def samples_of(rows: list[list[int]], seq_len: int = 24) -> Samples:
    return Samples(tuple(map(tuple, rows)), "test", seq_len, 0)
