"""Families that vLLM has and transformers has not: configs and names written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from families.text import GROUPS, LATENT, ROUTED, SIZES

Shapes = dict[str, tuple[int, ...]]

WIDTH, INNER, HEADS, KV, VOCAB = 256, 512, 256, 128, 512


def tensors_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random bf16 tensors; vectors are ones, as norms are."""
    torch.manual_seed(0)
    return {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.05).bfloat16()
        for name, shape in shapes.items()
    }


def weights(**shapes: tuple[int, ...]) -> Shapes:
    """`mlp__up_proj=(512, 256)` -> {"mlp.up_proj.weight": (512, 256)}."""
    return {name.replace("__", ".") + ".weight": shape for name, shape in shapes.items()}


def repeated(prefix: str, count: int, layer: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for name, shape in layer.items()}


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


ATTENTION = weights(
    self_attn__q_proj=(HEADS, WIDTH),
    self_attn__k_proj=(KV, WIDTH),
    self_attn__v_proj=(KV, WIDTH),
    self_attn__o_proj=(WIDTH, HEADS),
)
MLP = weights(
    mlp__gate_proj=(INNER, WIDTH), mlp__up_proj=(INNER, WIDTH), mlp__down_proj=(WIDTH, INNER)
)
NORMS = weights(input_layernorm=(WIDTH,), post_attention_layernorm=(WIDTH,))
ENDS = weights(model__embed_tokens=(VOCAB, WIDTH), model__norm=(WIDTH,), lm_head=(VOCAB, WIDTH))
LLAMA = ENDS | repeated("model.layers", 2, ATTENTION | MLP | NORMS)
QWEN2_BIASES: Shapes = {
    f"model.layers.{i}.self_attn.{p}_proj.bias": (HEADS if p == "q" else KV,)
    for i in range(2)
    for p in "qkv"
}
EXPERT = weights(gate_proj=(128, WIDTH), up_proj=(128, WIDTH), down_proj=(WIDTH, 128))
EXPERTS = weights(mlp__gate=(4, WIDTH)) | repeated("mlp.experts", 4, EXPERT)
LATENT_ATTENTION = weights(
    self_attn__q_a_proj=(128, WIDTH),
    self_attn__q_a_layernorm=(128,),
    self_attn__q_b_proj=(4 * 96, 128),
    self_attn__kv_a_proj_with_mqa=(160, WIDTH),
    self_attn__kv_a_layernorm=(128,),
    self_attn__kv_b_proj=(4 * 128, 128),
    self_attn__o_proj=(WIDTH, 4 * 64),
)
DEEPSEEK = (
    ENDS
    | repeated("model.layers", 1, LATENT_ATTENTION | MLP | NORMS)
    | under(
        "model.layers.1",
        LATENT_ATTENTION
        | NORMS
        | EXPERTS
        | {"mlp.gate.e_score_correction_bias": (4,)}
        | under("mlp.shared_experts", EXPERT),
    )
)
SIGLIP_LAYER = {
    name + part: shape
    for name, out, inner in (
        ("self_attn.q_proj", 128, 128),
        ("self_attn.k_proj", 128, 128),
        ("self_attn.v_proj", 128, 128),
        ("self_attn.out_proj", 128, 128),
        ("mlp.fc1", 256, 128),
        ("mlp.fc2", 128, 256),
    )
    for part, shape in ((".weight", (out, inner)), (".bias", (out,)))
} | {f"layer_norm{n}.{part}": (128,) for n in (1, 2) for part in ("weight", "bias")}


def both(name: str, out: int, inner: int | None = None) -> Shapes:
    """A weight and its bias."""
    weight = (out,) if inner is None else (out, inner)
    return {f"{name}.weight": weight, f"{name}.bias": (out,)}


def config(architecture: str, model_type: str, **own: Any) -> dict[str, Any]:
    common = SIZES | {
        "num_hidden_layers": 2,
        "architectures": [architecture],
        "model_type": model_type,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return common | own


VIT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 28,
    "patch_size": 14,
}
DEEPSEEK_CONFIG = (
    config("DeepseekV3ForCausalLM", "deepseek_v3")
    | LATENT
    | ROUTED
    | GROUPS
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_scaling": None,
    }
)

HANDMADE: dict[str, tuple[dict[str, Any], Shapes]] = {
    "internlm2": (
        config("InternLM2ForCausalLM", "internlm2"),
        weights(model__tok_embeddings=(VOCAB, WIDTH), model__norm=(WIDTH,), output=(VOCAB, WIDTH))
        | repeated(
            "model.layers",
            2,
            weights(
                attention__wqkv=(HEADS + 2 * KV, WIDTH),
                attention__wo=(WIDTH, HEADS),
                feed_forward__w1=(INNER, WIDTH),
                feed_forward__w2=(WIDTH, INNER),
                feed_forward__w3=(INNER, WIDTH),
                attention_norm=(WIDTH,),
                ffn_norm=(WIDTH,),
            ),
        ),
    ),
    "exaone": (
        config(
            "ExaoneForCausalLM",
            "exaone",
            num_layers=2,
            activation_function="silu",
            layer_norm_epsilon=1e-5,
        ),
        weights(transformer__wte=(VOCAB, WIDTH), transformer__ln_f=(WIDTH,), lm_head=(VOCAB, WIDTH))
        | repeated(
            "transformer.h",
            2,
            weights(
                attn__attention__q_proj=(HEADS, WIDTH),
                attn__attention__k_proj=(KV, WIDTH),
                attn__attention__v_proj=(KV, WIDTH),
                attn__attention__out_proj=(WIDTH, HEADS),
                mlp__c_fc_0=(INNER, WIDTH),
                mlp__c_fc_1=(INNER, WIDTH),
                mlp__c_proj=(WIDTH, INNER),
                ln_1=(WIDTH,),
                ln_2=(WIDTH,),
            ),
        ),
    ),
    "chatglm": (
        config(
            "ChatGLMModel",
            "chatglm",
            num_layers=2,
            padded_vocab_size=VOCAB,
            ffn_hidden_size=INNER,
            kv_channels=64,
            multi_query_attention=True,
            multi_query_group_num=2,
            add_qkv_bias=True,
            add_bias_linear=False,
            layernorm_epsilon=1e-5,
            seq_length=128,
            original_rope=True,
        ),
        weights(
            transformer__embedding__word_embeddings=(VOCAB, WIDTH),
            transformer__encoder__final_layernorm=(WIDTH,),
            transformer__output_layer=(VOCAB, WIDTH),
        )
        | repeated(
            "transformer.encoder.layers",
            2,
            both("self_attention.query_key_value", HEADS + 2 * KV, WIDTH)
            | weights(
                self_attention__dense=(WIDTH, HEADS),
                mlp__dense_h_to_4h=(2 * INNER, WIDTH),
                mlp__dense_4h_to_h=(WIDTH, INNER),
            )
            | NORMS,
        ),
    ),
    "bailing_moe_v2": (
        config(
            "BailingMoeV2ForCausalLM",
            "bailing_moe",
            num_experts=4,
            num_experts_per_tok=2,
            num_shared_experts=1,
            moe_intermediate_size=128,
            moe_shared_expert_intermediate_size=128,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            use_bias=False,
            use_qkv_bias=False,
            embedding_dropout=0.0,
            n_group=1,
            topk_group=1,
            score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            routed_scaling_factor=1.0,
            use_qk_norm=True,
            rope_scaling=None,
        ),
        weights(model__word_embeddings=(VOCAB, WIDTH), model__norm=(WIDTH,), lm_head=(VOCAB, WIDTH))
        | repeated(
            "model.layers",
            2,
            weights(
                attention__query_key_value=(HEADS + 2 * KV, WIDTH),
                attention__dense=(WIDTH, HEADS),
                attention__query_layernorm=(64,),
                attention__key_layernorm=(64,),
            )
            | NORMS,
        )
        | under("model.layers.0", MLP)
        | under(
            "model.layers.1",
            EXPERTS | under("mlp.shared_experts", EXPERT) | {"mlp.gate.expert_bias": (4,)},
        ),
    ),
    "minicpm": (
        config(
            "MiniCPMForCausalLM",
            "minicpm",
            scale_emb=12,
            scale_depth=1.4,
            dim_model_base=256,
            num_experts=0,
        ),
        LLAMA,
    ),
    "minicpm_moe": (
        config(
            "MiniCPMForCausalLM",
            "minicpm",
            scale_emb=12,
            scale_depth=1.4,
            dim_model_base=256,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        ENDS
        | repeated(
            "model.layers",
            2,
            ATTENTION
            | NORMS
            | weights(mlp__gate=(4, WIDTH))
            | repeated(
                "mlp.experts",
                4,
                weights(w1=(INNER, WIDTH), w2=(WIDTH, INNER), w3=(INNER, WIDTH)),
            ),
        ),
    ),
    "minicpmv_2_6": (
        config(
            "MiniCPMV",
            "minicpmv",
            version=2.6,
            query_num=4,
            image_size=28,
            patch_size=14,
            slice_mode=True,
            drop_vision_last_layer=False,
            vision_config=VIT | {"model_type": "siglip_vision_model"},
            slice_config={"max_slice_nums": 1, "model_type": "minicpmv"},
        ),
        under("llm", LLAMA | QWEN2_BIASES)
        | repeated("vpm.encoder.layers", 2, SIGLIP_LAYER)
        | {
            "vpm.embeddings.patch_embedding.weight": (128, 3, 14, 14),
            "vpm.embeddings.patch_embedding.bias": (128,),
            "vpm.embeddings.position_embedding.weight": (4, 128),
            "resampler.query": (4, WIDTH),
            "resampler.proj": (WIDTH, WIDTH),
            "resampler.kv_proj.weight": (WIDTH, 128),
            "resampler.attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "resampler.attn.in_proj_bias": (3 * WIDTH,),
        }
        | both("vpm.post_layernorm", 128)
        | both("resampler.attn.out_proj", WIDTH, WIDTH)
        | both("resampler.ln_q", WIDTH)
        | both("resampler.ln_kv", WIDTH)
        | both("resampler.ln_post", WIDTH),
    ),
    "internvl_chat": (
        {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "llm_config": config("Qwen2ForCausalLM", "qwen2"),
            "vision_config": VIT
            | {
                "model_type": "intern_vit_6b",
                "norm_type": "layer_norm",
                "qkv_bias": True,
                "qk_normalization": False,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-6,
                "num_channels": 3,
                "initializer_factor": 1.0,
            },
            "downsample_ratio": 0.5,
            "ps_version": "v2",
            "select_layer": -1,
            "force_image_size": 28,
            "template": "internvl2_5",
            "use_thumbnail": True,
            "min_dynamic_patch": 1,
            "max_dynamic_patch": 2,
            "dynamic_image_size": True,
            "dtype": "bfloat16",
        },
        under("language_model", LLAMA | QWEN2_BIASES)
        | repeated(
            "vision_model.encoder.layers",
            2,
            both("attn.qkv", 384, 128)
            | both("attn.proj", 128, 128)
            | both("mlp.fc1", 256, 128)
            | both("mlp.fc2", 128, 256)
            | both("norm1", 128)
            | both("norm2", 128)
            | {"ls1": (128,), "ls2": (128,)},
        )
        | {
            "vision_model.embeddings.class_embedding": (1, 1, 128),
            "vision_model.embeddings.position_embedding": (1, 5, 128),
            "vision_model.embeddings.patch_embedding.weight": (128, 3, 14, 14),
            "vision_model.embeddings.patch_embedding.bias": (128,),
        }
        | both("mlp1.0", 512)
        | both("mlp1.1", WIDTH, 512)
        | both("mlp1.3", WIDTH, WIDTH),
    ),
    "kimi_vl": (
        {
            "architectures": ["KimiVLForConditionalGeneration"],
            "model_type": "kimi_vl",
            "text_config": DEEPSEEK_CONFIG,
            "vision_config": VIT
            | {
                "model_type": "moonvit",
                "init_pos_emb_height": 4,
                "init_pos_emb_width": 4,
                "merge_kernel_size": [2, 2],
            },
            "media_placeholder_token_id": 500,
            "vocab_size": VOCAB,
            "dtype": "bfloat16",
        },
        under("language_model", DEEPSEEK)
        | repeated(
            "vision_tower.encoder.blocks",
            2,
            both("wqkv", 384, 128)
            | both("wo", 128, 128)
            | both("mlp.fc0", 256, 128)
            | both("mlp.fc1", 128, 256)
            | both("norm0", 128)
            | both("norm1", 128),
        )
        | {
            "vision_tower.patch_embed.proj.weight": (128, 3, 14, 14),
            "vision_tower.patch_embed.proj.bias": (128,),
            "vision_tower.patch_embed.pos_emb.weight": (4, 4, 128),
        }
        | both("vision_tower.encoder.final_layernorm", 128)
        | both("multi_modal_projector.pre_norm", 128)
        | both("multi_modal_projector.linear_1", 512, 512)
        | both("multi_modal_projector.linear_2", WIDTH, 512),
    ),
    "telechat2": (
        config(
            "TeleChat2ForCausalLM",
            "telechat",
            n_layer=2,
            n_head=4,
            ffn_hidden_size=INNER,
            layer_norm_epsilon=1e-5,
            num_key_value_heads=4,
        ),
        weights(
            transformer__word_embeddings=(VOCAB, WIDTH),
            transformer__ln_f=(WIDTH,),
            lm_head=(VOCAB, WIDTH),
        )
        | repeated(
            "transformer.h",
            2,
            weights(
                self_attention__query=(HEADS, WIDTH),
                self_attention__key_value=(2 * HEADS, WIDTH),
                mlp__gate_proj=(INNER, WIDTH),
                mlp__up_proj=(INNER, WIDTH),
            )
            | both("self_attention.dense", WIDTH, HEADS)
            | both("mlp.down_proj", WIDTH, INNER)
            | NORMS,
        ),
    ),
    "nemotron_nas": (
        config(
            "DeciLMForCausalLM",
            "nemotron-nas",
            num_hidden_layers=3,
            num_key_value_heads=None,
            block_configs=[
                {
                    "attention": {
                        "n_heads_in_group": 2,
                        "no_op": False,
                        "replace_with_linear": False,
                    },
                    "ffn": {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False},
                },
                {
                    "attention": {"n_heads_in_group": None, "no_op": True},
                    "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
                },
                {
                    "attention": {
                        "n_heads_in_group": 4,
                        "no_op": False,
                        "replace_with_linear": False,
                    },
                    "ffn": {"ffn_mult": None, "no_op": True},
                },
            ],
        ),
        ENDS
        | under("model.layers.0", ATTENTION | NORMS)
        | under("model.layers.0.mlp", weights(gate_proj=(512, 256), up_proj=(512, 256)))
        | under("model.layers.0.mlp", weights(down_proj=(256, 512)))
        | under("model.layers.1", weights(post_attention_layernorm=(WIDTH,)))
        | under("model.layers.1.mlp", weights(gate_proj=(256, 256), up_proj=(256, 256)))
        | under("model.layers.1.mlp", weights(down_proj=(256, 256)))
        | under(
            "model.layers.2",
            ATTENTION
            | weights(input_layernorm=(WIDTH,))
            | weights(self_attn__k_proj=(64, WIDTH), self_attn__v_proj=(64, WIDTH)),
        ),
    ),
}
"""Family -> config.json, and the shape of each tensor."""
