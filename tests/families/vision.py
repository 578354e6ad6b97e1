"""Tiny configs of families that see images: a text model of `text.SIZES`, and a tower of 64."""

from __future__ import annotations

from families.text import (
    DELTA,
    DENSE_FIRST,
    EXPERTS,
    GROUPS,
    QWEN_MOE,
    ROUTED,
    SLIDING,
    Config,
    text,
)

TOWER: Config = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 28,
    "patch_size": 14,
}
BLOCKS: Config = {
    "depth": 2,
    "hidden_size": 128,
    "num_heads": 2,
    "intermediate_size": 256,
    "out_hidden_size": 256,
    "num_position_embeddings": 16,
    "patch_size": 14,
}
QWEN_TOKENS: Config = {
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}
MROPE: Config = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [12, 10, 10],
    }
}
HALF_MROPE: Config = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [4, 6, 6],
    }
}
SIGLIP = TOWER | {"model_type": "siglip_vision_model"}
CLIP = TOWER | {"model_type": "clip_vision_model", "projection_dim": 64}
PIXTRAL = TOWER | {"model_type": "pixtral", "head_dim": 64}


def image_text(language: Config, vision: Config, **own: object) -> Config:
    """A config of a text model and a tower; image tokens lie inside the tiny vocabulary."""
    token = {"image_token_index": 500, "image_token_id": 500}
    return {"text_config": language, "vision_config": vision} | token | own


VISION: dict[str, tuple[str, Config]] = {
    "llava": ("llava", image_text(text(model_type="llama"), CLIP)),
    "llava_qwen2": ("llava", image_text(text(model_type="qwen2"), SIGLIP)),
    "llava_next": (
        "llava_next",
        image_text(text(model_type="mistral"), CLIP, image_grid_pinpoints=[[28, 56]]),
    ),
    "llava_next_video": (
        "llava_next_video",
        image_text(text(model_type="llama"), CLIP, image_grid_pinpoints=[[28, 56]])
        | {"video_token_index": 501, "video_token_id": 501},
    ),
    "llava_onevision": (
        "llava_onevision",
        image_text(text(model_type="qwen2"), SIGLIP, image_grid_pinpoints=[[28, 56]])
        | {"video_token_index": 501, "video_token_id": 501},
    ),
    "mistral3": ("mistral3", image_text(text(model_type="mistral"), PIXTRAL)),
    "mistral3_ministral": ("mistral3", image_text(text(model_type="ministral3"), PIXTRAL)),
    "pixtral": ("llava", image_text(text(model_type="mistral"), PIXTRAL)),
    "paligemma": (
        "paligemma",
        image_text(text(model_type="gemma"), SIGLIP | {"projection_dim": 256})
        | {"hidden_size": 256, "projection_dim": 256},
    ),
    "gemma3": (
        "gemma3",
        image_text(
            text(sliding_window=8, layer_types=SLIDING),
            SIGLIP,
            mm_tokens_per_image=4,
            boi_token_index=501,
            eoi_token_index=502,
        ),
    ),
    "gemma4": (
        "gemma4",
        {
            "text_config": text(
                layer_types=SLIDING,
                sliding_window=8,
                global_head_dim=128,
                num_kv_shared_layers=2,
                hidden_size_per_layer_input=128,
                vocab_size_per_layer_input=512,
            ),
            "vision_config": TOWER
            | {"head_dim": 64, "num_key_value_heads": 2, "position_embedding_size": 16},
            "audio_config": None,
            "image_token_id": 500,
            "boi_token_id": 501,
            "eoi_token_id": 502,
            "video_token_id": 503,
            "audio_token_id": 504,
        },
    ),
    "gemma4_mm_moe": (
        "gemma4",
        {
            "text_config": text(
                ROUTED,
                layer_types=SLIDING,
                sliding_window=8,
                global_head_dim=128,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
                num_kv_shared_layers=0,
                hidden_size_per_layer_input=0,
                vocab_size_per_layer_input=512,
                enable_moe_block=True,
                num_experts=4,
                top_k_experts=2,
            ),
            "vision_config": TOWER
            | {"head_dim": 64, "num_key_value_heads": 2, "position_embedding_size": 16},
            "audio_config": None,
            "image_token_id": 500,
            "boi_token_id": 501,
            "eoi_token_id": 502,
            "video_token_id": 503,
            "audio_token_id": 504,
        },
    ),
    "qwen2_vl": (
        "qwen2_vl",
        {
            "text_config": text(MROPE),
            "vision_config": {"depth": 2, "embed_dim": 128, "hidden_size": 256, "num_heads": 2},
        }
        | QWEN_TOKENS,
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"text_config": text(MROPE), "vision_config": BLOCKS | {"fullatt_block_indexes": [1]}}
        | QWEN_TOKENS,
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": text(MROPE),
            "vision_config": BLOCKS | {"deepstack_visual_indexes": [0]},
        }
        | QWEN_TOKENS,
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "text_config": text(EXPERTS, MROPE),
            "vision_config": BLOCKS | {"deepstack_visual_indexes": [0]},
        }
        | QWEN_TOKENS,
    ),
    "qwen3_5": ("qwen3_5", {"text_config": text(DELTA), "vision_config": BLOCKS} | QWEN_TOKENS),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {"text_config": text(QWEN_MOE, DELTA), "vision_config": BLOCKS} | QWEN_TOKENS,
    ),
    "glm4v": (
        "glm4v",
        {"text_config": text(HALF_MROPE), "vision_config": BLOCKS}
        | {"image_token_id": 500, "video_token_id": 501},
    ),
    "glm4v_moe": (
        "glm4v_moe",
        {
            "text_config": text(
                ROUTED, GROUPS, HALF_MROPE, n_routed_experts=4, first_k_dense_replace=1
            ),
            "vision_config": BLOCKS,
            "image_token_id": 500,
            "video_token_id": 501,
        },
    ),
    "glm_ocr": (
        "glm_ocr",
        {"text_config": text(HALF_MROPE), "vision_config": BLOCKS}
        | {"image_token_id": 500, "video_token_id": 501},
    ),
    "idefics3": ("idefics3", image_text(text(model_type="llama"), TOWER)),
    "smolvlm": ("smolvlm", image_text(text(model_type="llama"), TOWER)),
    "internvl": (
        "internvl",
        image_text(
            text(model_type="qwen2"), TOWER | {"image_size": [28, 28], "patch_size": [14, 14]}
        ),
    ),
    "aya_vision": ("aya_vision", image_text(text(model_type="cohere2"), SIGLIP)),
    "cohere2_vision": (
        "cohere2_vision",
        image_text(text(model_type="cohere2"), SIGLIP, alignment_intermediate_size=512),
    ),
    "aria": (
        "aria",
        image_text(
            text(model_type="aria_text", intermediate_size=128, moe_num_experts=4, moe_topk=2),
            TOWER | {"model_type": "idefics3_vision"},
        )
        | {"projector_patch_to_query_dict": {4: 4}},
    ),
    "lfm2_vl": (
        "lfm2_vl",
        image_text(
            text(model_type="lfm2", layer_types=["conv", "full_attention"] * 2),
            {
                "model_type": "siglip2_vision_model",
                "hidden_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 256,
                "num_patches": 16,
                "vision_use_head": False,
                "patch_size": 14,
            },
        ),
    ),
    "llama4": (
        "llama4",
        image_text(
            text(
                intermediate_size_mlp=512,
                intermediate_size=256,
                num_local_experts=4,
                interleave_moe_layer_step=2,
                no_rope_layers=[1, 1, 1, 0],
            ),
            TOWER
            | {"projector_input_dim": 128, "projector_output_dim": 128, "vision_output_dim": 128},
            boi_token_index=501,
            eoi_token_index=502,
        ),
    ),
    "llama_guard4": (
        "llama4",
        image_text(
            text(
                intermediate_size_mlp=512,
                intermediate_size=256,
                num_local_experts=0,
                moe_layers=[],
                interleave_moe_layer_step=0,
                no_rope_layers=[1, 1, 1, 0],
            ),
            TOWER
            | {"projector_input_dim": 128, "projector_output_dim": 128, "vision_output_dim": 128},
            boi_token_index=501,
            eoi_token_index=502,
        ),
    ),
    "blip2": (
        "blip-2",
        {
            "text_config": text(
                model_type="opt",
                num_key_value_heads=4,
                ffn_dim=512,
                word_embed_proj_dim=256,
                max_position_embeddings=128,
            ),
            "vision_config": TOWER,
            "qformer_config": {
                "hidden_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 256,
                "encoder_hidden_size": 128,
                "vocab_size": 512,
            },
            "image_token_index": 500,
            "num_query_tokens": 4,
        },
    ),
    "ernie4_5_vl_moe": (
        "ernie4_5_vl_moe",
        {
            "text_config": text(
                MROPE,
                moe_intermediate_size=[128, 128],
                moe_num_experts=4,
                moe_k=2,
                mlp_layer_types=DENSE_FIRST,
            ),
            "vision_config": BLOCKS,
            "image_token_id": 500,
            "image_start_token_id": 501,
            "image_end_token_id": 502,
            "video_token_id": 503,
            "video_start_token_id": 504,
            "video_end_token_id": 505,
        },
    ),
    "exaone4_5": (
        "exaone4_5",
        {
            "text_config": text(model_type="exaone4", sliding_window=8, sliding_window_pattern=4),
            "vision_config": BLOCKS | {"num_key_value_heads": 2, "fullatt_block_indexes": [1]},
            "image_token_id": 500,
            "video_token_id": 501,
        },
    ),
    "mllama": (
        "mllama",
        image_text(
            text(cross_attention_layers=[1]),
            TOWER
            | {
                "attention_heads": 2,
                "num_global_layers": 1,
                "vision_output_dim": 256,
                "intermediate_layers_indices": [0],
            },
        ),
    ),
}
"""Family -> transformers' model type, and its config."""

VISION_EXTRA: dict[str, dict[str, Config]] = {
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True, "tie_word_embeddings": False}},
    "glm4v_moe": {"text_config": {"use_qk_norm": False}},
    "lfm2_vl": {"text_config": {"block_dim": 256, "conv_dim": 256, "conv_dim_out": 256}},
    "ernie4_5_vl_moe": {"vision_config": {"embed_dim": 128, "mlp_ratio": 2}},
}
"""What the parts of config.json have on the hub, and transformers forgets when it saves."""
