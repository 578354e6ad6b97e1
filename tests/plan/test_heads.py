"""Head counts are those of transformers' config classes, and fit the modules that they build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_shapes import Save, weights

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import PlanError
from ckptq.models.attention import attention_kind
from ckptq.models.heads import config_heads, heads_in, layer_heads
from ckptq.models.modules import read_layout
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme

H = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FALCON_180B = {"num_kv_heads": 2, "new_decoder_architecture": True}
DBRX = {
    "d_model": 256,
    "n_layers": 2,
    "vocab_size": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
}
SPELLINGS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("falcon", {**H, "num_attention_heads": 8, **FALCON_180B}, (8, 2)),
    ("falcon", {**H, "num_attention_heads": 8}, (8, 1)),
    ("falcon", {**H, "num_attention_heads": 8, "num_kv_heads": 8}, (8, 1)),
    ("falcon", {**H, "num_attention_heads": 8, "multi_query": False}, (8, 8)),
    ("gpt_bigcode", {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 64}, (4, 1)),
    (
        "gpt_bigcode",
        {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 64, "multi_query": False},
        (4, 4),
    ),
    ("bloom", {"hidden_size": 256, "n_layer": 2, "n_head": 8, "vocab_size": 64}, (8, 8)),
    ("mpt", {"d_model": 256, "n_heads": 8, "n_layers": 2, "vocab_size": 64}, (8, 8)),
    ("dbrx", {**DBRX, "n_heads": 4}, (4, 2)),
    ("gpt_neox", {**H, "num_attention_heads": 4, "intermediate_size": 64}, (4, 4)),
    ("gpt_neo", {"hidden_size": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
                 "attention_types": [[["global", "local"], 1]]}, (4, 4)),
    ("xglm", {"d_model": 256, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64,
              "vocab_size": 64}, (4, 4)),
    ("phi3", {**H, "num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0},
     (8, 2)),
    ("codegen", {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 64, "rotary_dim": 16},
     (4, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "arguments", "heads"), SPELLINGS)
def test_counts_are_those_of_the_modules(
    model_type: str, arguments: dict[str, Any], heads: tuple[int, int]
) -> None:
    """config.json as transformers writes it, and the projections that it builds from it."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **arguments)
    written = json.loads(config.to_json_string(use_diff=False))
    assert config_heads(written) == layer_heads(written, 1) == heads
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    layers = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == 2
    )
    kinds = {name: attention_kind(name, layers, 2, written) for name in shapes}
    modules = {name.rpartition(".")[0] for name, kind in kinds.items() if kind == "heads"}
    assert len(modules) == 2
    for module in modules:
        assert heads_in(module, heads, shapes) == heads
        # shapes alone find the count of keys and values
        assert heads_in(module, (heads[0], heads[0]), shapes) == heads


def test_jetmoe_has_a_query_head_for_each_expert_of_a_token() -> None:
    assert config_heads({"model_type": "jetmoe", "num_key_value_heads": 2, **MOE}) == (4, 2)


def test_layers_may_have_counts_of_their_own() -> None:
    openelm = {"num_query_heads": [12, 12, 16], "num_kv_heads": [3, 3, 4]}
    assert config_heads(openelm) == (12, 3)
    assert layer_heads(openelm, 2) == (16, 4)
    blocks = [
        {"attention": {"no_op": True, "n_heads_in_group": None}},
        {"attention": {"no_op": False, "n_heads_in_group": 4}},
        {"attention": {"no_op": False, "n_heads_in_group": 8}},
    ]
    nas = {"num_attention_heads": 32, "num_key_value_heads": None, "block_configs": blocks}
    assert [layer_heads(nas, index) for index in range(3)] == [None, (32, 8), (32, 4)]
    assert config_heads(nas) == (32, 8)
    assert config_heads({"num_attention_heads": 32, "num_key_value_heads_per_layer": [4, 1]}) == (
        32,
        4,
    )


@pytest.mark.parametrize(
    "config", [{}, {"num_attention_heads": 0}, {"num_attention_heads": "8"}, {"num_heads": 128}]
)
def test_a_config_without_heads_has_none(config: dict[str, Any]) -> None:
    """Mamba-2's num_heads are no attention heads."""
    assert config_heads(config) is None


def fused_qkv(save: Save, rows: int, config: dict[str, Any]) -> Path:
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for index in range(2):
        layer = f"transformer.h.{index}.self_attention"
        shapes += [(f"{layer}.query_key_value.weight", (rows, 256))]
        shapes += [(f"{layer}.dense.weight", (256, 256))]
    return save(weights(*shapes), config)


def test_falcon_s_plan_has_its_own_heads(save: Save) -> None:
    """232 of them were planned for Falcon-180B's 8."""
    config = {"model_type": "falcon", "num_attention_heads": 8, "num_hidden_layers": 2}
    folder = fused_qkv(save, 384, {**config, **FALCON_180B})
    attention = make_plan(open_checkpoint(folder), load_scheme("fp8-per-head")).attention
    assert attention is not None
    module = "transformer.h.1.self_attention"
    assert attention.scales[module][f"{module}.k_scale"].shape == (2, 1, 1)
    assert attention.scales[module][f"{module}.q_scale"].shape == (8, 1, 1)


def test_bloom_has_attention(save: Save) -> None:
    folder = fused_qkv(save, 768, {"model_type": "bloom", "n_head": 8, "n_layer": 2})
    attention = make_plan(open_checkpoint(folder), load_scheme("fp8-per-head")).attention
    assert attention is not None
    assert len(attention.scales) == 2


def test_what_is_missing_is_said_truthfully(save: Save) -> None:
    """Projections without heads."""
    folder = fused_qkv(save, 768, {"model_type": "bloom", "n_layer": 2})
    with pytest.raises(PlanError, match=r"gives no number of heads for transformer\.h\.0"):
        make_plan(open_checkpoint(folder), load_scheme("fp8-per-head"))
    ckpt = open_checkpoint(folder)
    assert read_layout(ckpt).num_layers == 2


def test_heads_without_projections_are_no_model_without_attention(save: Save) -> None:
    odd = weights(("model.layers.0.mixer.keys.weight", (64, 64)))
    folder = save(odd, {"num_attention_heads": 4, "num_hidden_layers": 1})
    with pytest.raises(PlanError, match=r"found no Linear .* that computes the keys of 4 heads"):
        make_plan(open_checkpoint(folder), load_scheme("fp8-per-head"))
