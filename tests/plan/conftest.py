"""Checkpoints of tensors that nobody trained, in the names and shapes of real families."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_shapes import Save, weights
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB, EXPERTS = 128, 4, 2, 32, 256, 64, 4

CONFIG = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write tensors and config as a checkpoint folder with one file."""

    def write(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def attention(layer: str) -> list[tuple[str, tuple[int, ...]]]:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return [
        (f"{layer}.self_attn.q_proj.weight", (q, HIDDEN)),
        (f"{layer}.self_attn.k_proj.weight", (kv, HIDDEN)),
        (f"{layer}.self_attn.v_proj.weight", (kv, HIDDEN)),
        (f"{layer}.self_attn.o_proj.weight", (HIDDEN, q)),
        (f"{layer}.input_layernorm.weight", (HIDDEN,)),
    ]


def mlp(parent: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (f"{parent}.gate_proj.weight", (INTERMEDIATE, HIDDEN)),
        (f"{parent}.up_proj.weight", (INTERMEDIATE, HIDDEN)),
        (f"{parent}.down_proj.weight", (HIDDEN, INTERMEDIATE)),
    ]


@pytest.fixture
def llama(save: Save) -> Path:
    shapes = [("model.embed_tokens.weight", (VOCAB, HIDDEN)), ("lm_head.weight", (VOCAB, HIDDEN))]
    for index in range(2):
        layer = f"model.layers.{index}"
        shapes += [*attention(layer), *mlp(f"{layer}.mlp")]
    return save(
        weights(*shapes), {**CONFIG, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    )


@pytest.fixture
def mimo(save: Save) -> Path:
    """Layer 1 has more key/value heads than the config says, and values smaller than its keys."""
    layer = "model.layers.1.self_attn"
    shapes = [
        *attention("model.layers.0"),
        (f"{layer}.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)),
        (f"{layer}.k_proj.weight", (HEADS * HEAD_DIM, HIDDEN)),
        (f"{layer}.v_proj.weight", (HEADS * HEAD_DIM // 2, HIDDEN)),
        (f"{layer}.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM // 2)),
    ]
    return save(weights(*shapes), {**CONFIG, "model_type": "mimo_v2_flash"})


@pytest.fixture
def llama4(save: Save) -> Path:
    """Dense layer 0, experts in layer 1, a vision tower, a projector, a router."""
    prefix = "language_model.model.layers"
    shapes = [
        *attention(f"{prefix}.0"),
        *mlp(f"{prefix}.0.feed_forward"),
        *attention(f"{prefix}.1"),
        (f"{prefix}.1.feed_forward.experts.gate_up_proj", (EXPERTS, HIDDEN, 2 * INTERMEDIATE)),
        (f"{prefix}.1.feed_forward.experts.down_proj", (EXPERTS, INTERMEDIATE, HIDDEN)),
        (f"{prefix}.1.feed_forward.router.weight", (EXPERTS, HIDDEN)),
        *mlp(f"{prefix}.1.feed_forward.shared_expert"),
        ("language_model.lm_head.weight", (VOCAB, HIDDEN)),
        ("multi_modal_projector.linear_1.weight", (HIDDEN, HIDDEN)),
        ("vision_model.model.layers.0.self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
        ("vision_model.model.layers.0.self_attn.k_proj.weight", (HIDDEN, HIDDEN)),
    ]
    return save(
        weights(*shapes),
        {
            "model_type": "llama4",
            "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": {
                **CONFIG,
                "intermediate_size_mlp": INTERMEDIATE,
                "num_local_experts": EXPERTS,
                "interleave_moe_layer_step": 2,
            },
        },
    )


@pytest.fixture
def gpt_oss(save: Save) -> Path:
    """Interleaved gate and up, with biases."""
    layer = "model.layers.0"
    shapes = [
        *attention(layer),
        (f"{layer}.mlp.router.weight", (EXPERTS, HIDDEN)),
        (f"{layer}.mlp.experts.gate_up_proj", (EXPERTS, HIDDEN, 2 * INTERMEDIATE)),
        (f"{layer}.mlp.experts.gate_up_proj_bias", (EXPERTS, 2 * INTERMEDIATE)),
        (f"{layer}.mlp.experts.down_proj", (EXPERTS, INTERMEDIATE, HIDDEN)),
        (f"{layer}.mlp.experts.down_proj_bias", (EXPERTS, HIDDEN)),
    ]
    config = {
        **CONFIG,
        "num_hidden_layers": 1,
        "num_local_experts": EXPERTS,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
    }
    return save(weights(*shapes), config)


@pytest.fixture
def deepseek(save: Save) -> Path:
    """Latent attention, shared experts, a multi-token prediction layer behind the last one."""
    shapes = []
    for index in range(3):
        layer = f"model.layers.{index}"
        shapes += [
            (f"{layer}.self_attn.q_a_proj.weight", (64, HIDDEN)),
            (f"{layer}.self_attn.kv_a_proj_with_mqa.weight", (64, HIDDEN)),
            (f"{layer}.self_attn.kv_b_proj.weight", (128, 64)),
            (f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)),
            *mlp(f"{layer}.mlp.shared_experts"),
            *mlp(f"{layer}.mlp.experts.0"),
        ]
    return save(
        weights(*shapes),
        {
            **CONFIG,
            "n_routed_experts": EXPERTS,
            "first_k_dense_replace": 0,
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
        },
    )


@pytest.fixture
def mamba(save: Save) -> Path:
    """No attention at all."""
    return save(weights(("backbone.layers.0.mixer.in_proj.weight", (64, 64))), {"model_type": "x"})
