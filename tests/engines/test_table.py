"""The table against what is known of vLLM from elsewhere, and names that it was not shown."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptq.engines.architecture import Architecture
from ckptq.engines.table import load_table

TABLE = load_table()


def arch(name: str) -> Architecture:
    found = TABLE.architecture([name])
    assert found, name
    return found


def routers() -> Iterator[tuple[str, str]]:
    for name in TABLE.architectures:
        for pattern, row in arch(name).rows.items():
            if pattern.rpartition(".")[2] in ("gate", "router") and row.fate != "absent":
                yield name, pattern


ROUTERS_UNDER_THE_SCHEME = {
    "Lfm2MoeForCausalLM",
    "PhimoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
}
"""vLLM passes the quantization config to their routers: they must stand in `ignore`."""


def test_routers_are_plain_but_where_vllm_says_otherwise() -> None:
    found = list(routers())
    assert len(found) > 25
    under = {a for a, p in found if arch(a).rows[p].fate == "quantized"}
    assert under == ROUTERS_UNDER_THE_SCHEME
    assert {arch(a).rows[p].fate for a, p in found if a not in under} == {"plain"}


def test_experts_are_quantized_in_the_same_families() -> None:
    """The twin of the routers' test: beside a plain router lies what is not plain."""
    for name in {name for name, _ in routers()} - {"MiniCPMForCausalLM"}:  # matrices of its own
        found = arch(name)
        assert found.expert_names, name
        rows = [row for row in found.rows.values() if row.engine in found.expert_names]
        assert {row.fate for row in rows} == {"quantized"}, name
        assert {row.parameter for row in rows} == {"w13_weight", "w2_weight"}, name


@pytest.mark.parametrize(
    ("name", "module", "fate"),
    [
        ("JambaForCausalLM", "model.layers.1.mamba.in_proj", "plain"),
        ("JambaForCausalLM", "model.layers.1.mamba.x_proj", "plain"),
        ("JambaForCausalLM", "model.layers.1.mamba.out_proj", "plain"),
        ("JambaForCausalLM", "model.layers.2.self_attn.q_proj", "quantized"),
        ("DeepseekV32ForCausalLM", "model.layers.9.self_attn.indexer.wk", "plain"),
        ("DeepseekV32ForCausalLM", "model.layers.9.self_attn.indexer.weights_proj", "plain"),
        ("DeepseekV32ForCausalLM", "model.layers.9.self_attn.indexer.wq_b", "quantized"),
        ("GlmMoeDsaForCausalLM", "model.layers.9.self_attn.indexer.wk", "plain"),
        ("Llama4ForConditionalGeneration", "vision_model.model.layers.3.mlp.fc1", "plain"),
        ("Llama4ForConditionalGeneration", "vision_model.model.layers.3.self_attn.q_proj", "plain"),
        (
            "Llama4ForConditionalGeneration",
            "language_model.model.layers.3.feed_forward.router",
            "plain",
        ),
        (
            "Qwen3_5MoeForConditionalGeneration",
            "model.language_model.layers.3.mlp.shared_expert_gate",
            "plain",
        ),
        ("LlamaForCausalLM", "model.embed_tokens", "plain"),
        ("LlamaForCausalLM", "model.layers.0.made_up_proj", None),
    ],
)
def test_fate(name: str, module: str, fate: str | None) -> None:
    assert arch(name).fate(module) == fate


def test_what_the_engine_does_not_load_has_no_fate() -> None:
    deepseek = arch("DeepseekV3ForCausalLM")
    row = deepseek.row("model.layers.61.eh_proj")
    assert row
    assert row.fate == "absent"
    assert deepseek.fate("model.layers.61.eh_proj") is None


@pytest.mark.parametrize(
    ("name", "parent", "parts", "merged"),
    [
        ("LlamaForCausalLM", "model.layers.5.self_attn", "q_proj k_proj v_proj", "qkv_proj"),
        ("LlamaForCausalLM", "model.layers.5.mlp", "gate_proj up_proj", "gate_up_proj"),
        (
            "DeepseekV3ForCausalLM",
            "model.layers.5.self_attn",
            "q_a_proj kv_a_proj_with_mqa",
            "fused_qkv_a_proj",
        ),
        (
            "Qwen3_5ForConditionalGeneration",
            "model.language_model.layers.1.linear_attn",
            "in_proj_qkv in_proj_z",
            "in_proj_qkvz",
        ),
        (
            "Qwen3_5ForConditionalGeneration",
            "model.language_model.layers.1.linear_attn",
            "in_proj_b in_proj_a",
            "in_proj_ba",
        ),
        ("ExaoneForCausalLM", "transformer.h.1.mlp", "c_fc_0 c_fc_1", "gate_up_proj"),
        ("InternLM2ForCausalLM", "model.layers.1.feed_forward", "w1 w3", "gate_up_proj"),
        (
            "KimiLinearForCausalLM",
            "model.layers.1.self_attn",
            "q_proj k_proj v_proj b_proj f_a_proj",
            "in_proj_qkvgfab",
        ),
    ],
)
def test_fused_sets(name: str, parent: str, parts: str, merged: str) -> None:
    found = arch(name)
    siblings = tuple(f"{parent}.{part}" for part in parts.split())
    for sibling in siblings:
        assert found.fused_set(sibling) == siblings
        whole = found.merged_name(sibling)
        assert whole
        assert whole.rpartition(".")[2] == merged


def test_what_is_not_merged_stands_alone() -> None:
    llama = arch("LlamaForCausalLM")
    assert llama.fused_set("model.layers.0.mlp.down_proj") == ("model.layers.0.mlp.down_proj",)
    assert llama.merged_name("model.layers.0.mlp.down_proj") is None
    phi = arch("Phi3ForCausalLM")
    assert phi.fused_set("model.layers.0.self_attn.qkv_proj") == (
        "model.layers.0.self_attn.qkv_proj",
    )


def test_experts_are_merged_within_one_expert() -> None:
    mixtral = arch("MixtralForCausalLM")
    expert = "model.layers.31.block_sparse_moe.experts.7"
    assert mixtral.fused_set(f"{expert}.w3") == (f"{expert}.w1", f"{expert}.w3")
    assert mixtral.engine_module(f"{expert}.w2") == "model.layers.31.block_sparse_moe.experts"
    assert mixtral.merged_name(f"{expert}.w1") is None
    experts = mixtral.experts(f"{expert}.w2")
    assert experts
    assert experts.lookups == tuple(
        f"model.layers.31.block_sparse_moe.experts.0.{name}" for name in ("w1", "w3", "w2")
    )


def test_experts_without_a_gate_are_asked_for_by_a_name_that_is_none() -> None:
    experts = arch("NemotronHForCausalLM").experts("backbone.layers.3.mixer.experts.1.up_proj")
    assert experts
    assert experts.lookups == tuple(
        f"model.layers.3.mixer.experts.0.{name}" for name in ("up_proj", "None", "down_proj")
    )


@pytest.mark.parametrize(
    ("name", "module", "experts"),
    [
        (
            "Qwen3_5MoeForConditionalGeneration",
            "model.language_model.layers.7.mlp.experts.gate_up_proj",
            "language_model.model.layers.7.mlp.experts",
        ),
        (
            "GraniteMoeForCausalLM",
            "model.layers.7.block_sparse_moe.input_linear",
            "model.layers.7.block_sparse_moe.experts",
        ),
        (
            "Llama4ForConditionalGeneration",
            "language_model.model.layers.7.feed_forward.experts.down_proj",
            "language_model.model.layers.7.feed_forward.experts",
        ),
    ],
)
def test_fused_tensors_of_experts(name: str, module: str, experts: str) -> None:
    found = arch(name)
    assert found.fate(module) == "quantized"
    assert found.engine_module(module) == experts
    assert found.fused_set(module) == (module,)


def test_one_expert_where_only_fused_tensors_were_seen() -> None:
    llama4 = arch("Llama4ForConditionalGeneration")
    name = "language_model.model.layers.1.feed_forward.experts.9.up_proj"
    assert llama4.fate(name) == "quantized"
    assert llama4.engine_module(name) == "language_model.model.layers.1.feed_forward.experts"
    assert llama4.fate(name.replace("up_proj", "side_proj")) is None
    expert = name.removesuffix(".up_proj")
    assert llama4.fused_set(name) == (f"{expert}.gate_proj", f"{expert}.up_proj")
    assert llama4.fused_set(f"{expert}.down_proj") == (f"{expert}.down_proj",)


@pytest.mark.parametrize(
    "variant",
    [
        "model.layers.4.self_attn.k_proj",
        "language_model.model.layers.4.self_attn.k_proj",
        "model.language_model.model.layers.4.self_attn.k_proj",
    ],
)
def test_a_prefix_that_was_not_seen(variant: str) -> None:
    qwen = arch("Qwen3_5MoeForConditionalGeneration")
    assert variant not in qwen.rows
    assert qwen.engine_module(variant) == "language_model.model.layers.4.self_attn.qkv_proj"
    parent = variant.rpartition(".")[0]
    assert qwen.fused_set(variant) == tuple(f"{parent}.{p}_proj" for p in "qkv")


def test_a_tower_is_not_taken_for_the_decoder() -> None:
    """Its names end alike; only the words before the first number tell them apart."""
    llava = arch("LlavaForConditionalGeneration")
    assert llava.fate("sound_tower.layers.4.self_attn.k_proj") is None
    assert llava.fate("language_model.model.layers.4.self_attn.k_proj") == "quantized"


@pytest.mark.parametrize(
    ("name", "parent", "module", "kind"),
    [
        ("LlamaForCausalLM", "model.layers.3.self_attn", "model.layers.3.self_attn.attn", "heads"),
        ("JambaForCausalLM", "model.layers.3.self_attn", "model.layers.3.attn", "heads"),
        ("JambaForCausalLM", "model.layers.3.mamba", "model.layers.3.mamba", "state"),
        (
            "DeepseekV3ForCausalLM",
            "model.layers.3.self_attn",
            "model.layers.3.self_attn.attn",
            "latent",
        ),
        (
            "Qwen3_5ForConditionalGeneration",
            "model.language_model.layers.0.linear_attn",
            "language_model.model.layers.0.linear_attn",
            "state",
        ),
    ],
)
def test_attention(name: str, parent: str, module: str, kind: str) -> None:
    attention = arch(name).attention(parent)
    assert attention
    assert (attention.module, attention.kind) == (module, kind)


def test_an_mlp_is_no_attention() -> None:
    assert arch("LlamaForCausalLM").attention("model.layers.3.mlp") is None
    assert arch("JambaForCausalLM").attention("model.layers.3.feed_forward") is None
    assert arch("Gemma4ForCausalLM").attention("model.layers.3") is None


def test_layers_that_share_a_cache() -> None:
    assert arch("Gemma4ForCausalLM").shares_cache
    assert not arch("LlamaForCausalLM").shares_cache


def test_scales_of_the_cache_that_the_engine_does_not_load() -> None:
    """Loud in LFM2, whose attention has none; by another name in GPT-J; as usual in Llama."""
    assert arch("LlamaForCausalLM").cache_scales == "k_scale"
    assert arch("GPTJForCausalLM").cache_scales == "attn.k_scale"
    lfm2 = arch("Lfm2ForCausalLM")
    assert lfm2.cache_scales is None
    assert "k_scale" in lfm2.refusals["cache"]


def test_gpt_oss_is_not_loaded_one_expert_at_a_time() -> None:
    assert "weights" in arch("GptOssForCausalLM").refusals
    assert "weights" not in arch("MixtralForCausalLM").refusals


def test_heads() -> None:
    assert arch("LlamaForCausalLM").heads == {"lm_head": "mixed"}  # seen with both kinds of config
    assert arch("MixtralForCausalLM").heads == {"lm_head": "own"}
    assert arch("Gemma2ForCausalLM").heads == {}  # its class has none, whatever the config says


def test_an_architecture_of_the_same_class() -> None:
    """InternLM3 is vLLM's Llama. What transformers builds for vLLM is not known by its class."""
    assert "InternLM3ForCausalLM" not in TABLE.architectures
    assert arch("InternLM3ForCausalLM").engine_class == "LlamaForCausalLM"
    assert TABLE.engine_class(["NanbeigeForCausalLM"]) == "TransformersForCausalLM"
    assert TABLE.architecture(["NanbeigeForCausalLM"]) is None
    assert TABLE.architecture(["NobodysForCausalLM"]) is None


def test_the_first_architecture_that_is_known_counts() -> None:
    found = TABLE.architecture(["NobodysForCausalLM", "LlamaForCausalLM"])
    assert found
    assert found.name == "LlamaForCausalLM"


def test_what_the_engine_itself_cannot_load() -> None:
    assert "KeyError" in (TABLE.failure(["DbrxForCausalLM"]) or "")
    assert TABLE.failure(["LlamaForCausalLM"]) is None


def test_no_such_engine() -> None:
    with pytest.raises(KeyError):
        load_table("nobody")


def test_experts_one_by_one_are_found_under_another_prefix() -> None:
    """Where only fused tensors were seen, as of Llama-4; twin: another module is not."""
    arch = load_table().architecture(["Llama4ForConditionalGeneration"])
    assert arch is not None
    for prefix in ("language_model.model", "model.language_model"):
        experts = f"{prefix}.layers.1.feed_forward.experts"
        assert arch.fate(f"{experts}.3.up_proj") == "quantized"
        assert arch.fate(f"{experts}.3.own_proj") is None
        assert arch.fate(f"{prefix}.layers.1.feed_forward.other.3.up_proj") is None
