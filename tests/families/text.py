"""Tiny configs of text families: what makes a family's modules different, and nothing else.

Widths are multiples of 128, so that every scheme's groups fit; `few` MoE experts of 128; 4 layers.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

SIZES: Config = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROUTED: Config = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
GROUPS: Config = {"n_group": 1, "topk_group": 1}
LATENT: Config = {
    "num_key_value_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
INDEXER: Config = {"index_head_dim": 64, "index_n_heads": 4, "index_topk": 16}
DELTA: Config = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MAMBA2: Config = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
SLIDING = ["sliding_attention", "full_attention"] * 2
DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
EXPERTS = ROUTED | {"num_experts": 4}
QWEN_MOE = EXPERTS | {"shared_expert_intermediate_size": 128}
FALCON: Config = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "bias": False,
}
GPT2: Config = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 512}


def text(*parts: Config, **own: Any) -> Config:
    """The common sizes, then what a family adds to them."""
    merged = dict(SIZES)
    for part in (*parts, own):
        merged |= part
    return merged


TEXT: dict[str, tuple[str, Config]] = {
    # --- attention and a gated MLP
    "llama": ("llama", text()),
    "llama_tied": ("llama", text(tie_word_embeddings=True)),
    "mistral": ("mistral", text(sliding_window=8)),
    "ministral3": ("ministral3", text()),
    "qwen2": ("qwen2", text()),
    "qwen3": ("qwen3", text()),
    "gemma": ("gemma", text()),
    "gemma2": ("gemma2", text(sliding_window=8)),
    "gemma3_text": ("gemma3_text", text(sliding_window=8, layer_types=SLIDING)),
    "vaultgemma": ("vaultgemma", text(sliding_window=8)),
    "glm": ("glm", text()),
    "glm4": ("glm4", text()),
    "granite": ("granite", text()),
    "granite_swa": ("granite_swa", text(sliding_window=8)),
    "cohere": ("cohere", text()),
    "cohere2": ("cohere2", text(sliding_window=8)),
    "olmo": ("olmo", text()),
    "olmo2": ("olmo2", text()),
    "olmo3": ("olmo3", text(sliding_window=8)),
    "smollm3": ("smollm3", text()),
    "ernie4_5": ("ernie4_5", text()),
    "exaone4": ("exaone4", text(sliding_window=8, sliding_window_pattern=4)),
    "hunyuan_dense": ("hunyuan_v1_dense", text()),
    "hyperclovax": ("hyperclovax", text()),
    "seed_oss": ("seed_oss", text()),
    "stablelm": ("stablelm", text()),
    "cwm": ("cwm", text(sliding_window=8)),
    "helium": ("helium", text()),
    "minicpm3": ("minicpm3", text(LATENT)),
    # --- their own names or shapes
    "phi": ("phi", text()),
    "phi3": ("phi3", text()),
    "starcoder2": ("starcoder2", text()),
    "nemotron": ("nemotron", text()),
    "arcee": ("arcee", text()),
    "jais2": ("jais2", text()),
    "apertus": ("apertus", text()),
    "falcon": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_7b": ("falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "gpt_neox": ("gpt_neox", text()),
    "gpt2": ("gpt2", GPT2),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 32, "tie_word_embeddings": False}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "opt": (
        "opt",
        text(
            num_key_value_heads=4, ffn_dim=512, word_embed_proj_dim=256, max_position_embeddings=128
        ),
    ),
    "bloom": ("bloom", text()),
    "mpt": ("mpt", {"d_model": 256, "n_heads": 4, "n_layers": 2, "vocab_size": 512}),
    "hrm_text": ("hrm_text", text(num_layers_per_stack=2)),
    # --- experts
    "mixtral": ("mixtral", text(num_local_experts=4)),
    "qwen2_moe": ("qwen2_moe", text(QWEN_MOE)),
    "qwen3_moe": ("qwen3_moe", text(EXPERTS)),
    "olmoe": ("olmoe", text(EXPERTS)),
    "flex_olmo": ("flex_olmo", text(num_experts=4, num_experts_per_tok=2)),
    "phimoe": ("phimoe", text(num_local_experts=4)),
    "granitemoe": ("granitemoe", text(num_local_experts=4, num_experts_per_tok=2)),
    "granitemoeshared": (
        "granitemoeshared",
        text(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=256),
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        text(
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=256,
            sliding_window=8,
        ),
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        text(
            moe_intermediate_size=128,
            moe_num_experts=4,
            moe_k=2,
            moe_layer_start_index=1,
            moe_layer_end_index=3,
        ),
    ),
    "hunyuan_moe": ("hunyuan_v1_moe", text(num_experts=4, moe_topk=2)),
    "gpt_oss": ("gpt_oss", text(num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "minimax": (
        "minimax",
        text(num_local_experts=4, layer_types=["linear_attention", "full_attention"] * 2),
    ),
    "minimax_m2": ("minimax_m2", text(num_local_experts=4, num_experts_per_tok=2)),
    "glm4_moe": (
        "glm4_moe",
        text(ROUTED, GROUPS, n_routed_experts=4, first_k_dense_replace=1),
    ),
    "dots1": (
        "dots1",
        text(ROUTED, GROUPS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1),
    ),
    "afmoe": ("afmoe", text(ROUTED, num_experts=4, num_shared_experts=1, sliding_window=8)),
    "exaone_moe": (
        "exaone_moe",
        text(ROUTED, GROUPS, num_experts=4, sliding_window=8, mlp_layer_types=DENSE_FIRST),
    ),
    "cohere2_moe": (
        "cohere2_moe",
        text(num_experts=4, num_experts_per_tok=2, sliding_window=8, num_shared_experts=1),
    ),
    "hy_v3": ("hy_v3", text(ROUTED, num_experts=4, mlp_layer_types=DENSE_FIRST)),
    "laguna": (
        "laguna",
        text(QWEN_MOE, num_attention_heads_per_layer=[4, 4, 4, 4], mlp_layer_types=DENSE_FIRST),
    ),
    "mellum": ("mellum", text(ROUTED, num_local_experts=4)),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        text(
            ROUTED,
            GROUPS,
            n_routed_experts=4,
            v_head_dim=64,
            sliding_window=8,
            mlp_layer_types=DENSE_FIRST,
        ),
    ),
    "dbrx": (
        "dbrx",
        {
            "d_model": 256,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "vocab_size": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "llama4_text": (
        "llama4_text",
        text(
            intermediate_size_mlp=512,
            intermediate_size=256,
            num_local_experts=4,
            interleave_moe_layer_step=2,
        ),
    ),
    "jetmoe": (
        "jetmoe",
        text(num_local_experts=4, kv_channels=64, num_key_value_heads=4, num_hidden_layers=2),
    ),
    # --- latent attention
    "deepseek_v2": (
        "deepseek_v2",
        text(ROUTED, GROUPS, LATENT, n_routed_experts=4, first_k_dense_replace=1),
    ),
    "deepseek_v2_lite": (
        "deepseek_v2",
        text(ROUTED, GROUPS, LATENT, n_routed_experts=4, first_k_dense_replace=1)
        | {"q_lora_rank": None},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        text(ROUTED, GROUPS, LATENT, n_routed_experts=4, first_k_dense_replace=1),
    ),
    "deepseek_v32": (
        "deepseek_v32",
        text(
            ROUTED,
            GROUPS,
            LATENT,
            INDEXER,
            n_routed_experts=4,
            mlp_layer_types=DENSE_FIRST,
            first_k_dense_replace=1,
        ),
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        text(
            ROUTED,
            GROUPS,
            LATENT,
            INDEXER,
            n_routed_experts=4,
            mlp_layer_types=DENSE_FIRST,
            first_k_dense_replace=1,
        ),
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        text(ROUTED, GROUPS, LATENT, n_routed_experts=4, mlp_layer_types=DENSE_FIRST),
    ),
    "axk1": (
        "axk1",
        text(ROUTED, GROUPS, LATENT, n_routed_experts=4, first_k_dense_replace=1),
    ),
    "longcat_flash": (
        "longcat_flash",
        text(
            LATENT,
            num_hidden_layers=6,
            num_layers=3,
            ffn_hidden_size=512,
            moe_topk=2,
            n_routed_experts=4,
            zero_expert_num=0,
            expert_ffn_hidden_size=128,
        ),
    ),
    "kimi_linear": (
        "kimi_linear",
        text(
            LATENT,
            q_lora_rank=None,
            moe_intermediate_size=128,
            num_experts=4,
            num_experts_per_token=2,
            linear_head_dim=64,
            linear_num_heads=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            mlp_layer_types=DENSE_FIRST,
        ),
    ),
    # --- a state instead of attention, or beside it
    "mamba": ("mamba", text(time_step_rank=128, state_size=16)),
    "falcon_mamba": ("falcon_mamba", text(time_step_rank=128, state_size=16)),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 64,
            "state_size": 64,
            "n_groups": 1,
            "vocab_size": 512,
        },
    ),
    "jamba": (
        "jamba",
        text(
            num_experts=4,
            attn_layer_period=4,
            attn_layer_offset=2,
            mamba_dt_rank=128,
            mamba_d_state=64,
            use_mamba_kernels=False,
        ),
    ),
    "bamba": ("bamba", text(MAMBA2, attn_layer_indices=[1, 3], mamba_chunk_size=16)),
    "zamba2": (
        "zamba2",
        {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 512,
            "vocab_size": 512,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_mem_blocks": 1,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 64,
            "mamba_d_state": 64,
            "adapter_rank": 128,
            "use_shared_attention_adapter": True,
        },
    ),
    "falcon_h1": ("falcon_h1", text(MAMBA2, mamba_d_ssm=512)),
    "granitemoehybrid": (
        "granitemoehybrid",
        text(
            MAMBA2,
            shared_intermediate_size=256,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["mamba", "attention"] * 2,
        ),
    ),
    "nemotron_h": (
        "nemotron_h",
        text(
            ROUTED,
            GROUPS,
            mamba_num_heads=8,
            mamba_head_dim=64,
            n_groups=2,
            ssm_state_size=64,
            layers_block_type=["mamba", "mlp", "attention", "moe"],
            moe_shared_expert_intermediate_size=128,
            n_routed_experts=4,
        ),
    ),
    "qwen3_next": ("qwen3_next", text(QWEN_MOE, DELTA)),
    "qwen3_5_text": ("qwen3_5_text", text(DELTA)),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", text(QWEN_MOE, DELTA)),
    "olmo_hybrid": ("olmo_hybrid", text(DELTA, linear_num_key_heads=4)),
    "lfm2": ("lfm2", text(layer_types=["conv", "full_attention"] * 2)),
    "lfm2_moe": (
        "lfm2_moe",
        text(
            ROUTED,
            num_dense_layers=1,
            num_experts=4,
            layer_types=["conv", "full_attention"] * 2,
        ),
    ),
    # --- layers that share a KV cache, or differ in their heads
    "gemma3n_text": (
        "gemma3n_text",
        text(
            layer_types=SLIDING,
            sliding_window=8,
            num_kv_shared_layers=2,
            laurel_rank=128,
            hidden_size_per_layer_input=128,
            vocab_size_per_layer_input=512,
            intermediate_size=[512] * 4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    "gemma4_e": (
        "gemma4_text",
        text(
            layer_types=SLIDING,
            sliding_window=8,
            global_head_dim=128,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=128,
            vocab_size_per_layer_input=512,
        ),
    ),
    "gemma4_moe": (
        "gemma4_text",
        text(
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
    ),
}
"""Family -> transformers' model type, and its config."""

NOAUX: Config = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
EXTRA: dict[str, Config] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True} | GROUPS,
    "axk1": NOAUX,
    "deepseek_v3": NOAUX,
    "deepseek_v32": NOAUX,
    "dots1": NOAUX,
    "glm_moe_dsa": NOAUX,
    "glm4_moe_lite": NOAUX | {"first_k_dense_replace": 1},
    "hy_v3": {
        "first_k_dense_replace": 1,
        "expert_hidden_dim": 128,
        "route_norm": True,
        "qk_norm": True,
    },
    "kimi_linear": {
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_experts_per_token": 2,
        "mla_use_nope": True,
        "moe_router_activation_func": "sigmoid",
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "head_dim": 64,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    },
    "lfm2": {"block_dim": 256, "conv_dim": 256, "conv_dim_out": 256},
    "longcat_flash": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_type": "identity",
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "layernorm_epsilon": 1e-5,
        "sliding_window_size": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 64,
        "swa_v_head_dim": 64,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
    },
    "minimax_m2": {"rotary_dim": 64, "scoring_func": "sigmoid", "use_routing_bias": True},
}
"""What config.json has on the hub, and transformers forgets when it saves."""
