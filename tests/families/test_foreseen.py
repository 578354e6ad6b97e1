"""What vLLM does not load of some families: told, left or ignored by the plan, without a vLLM.

Each of them was a wrong cell of `test_families_vllm.py` once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny.plans import plan_of

from ckptq.plan.doubts import transformers_doubts, vllm_doubts
from ckptq.verify.run import verify
from families.cells import make, write_token_ids
from families.sources import save, save_variant, write

ONE_BY_ONE = "--ignore 're:.*experts.*' leaves them unquantized"


def told(source: Path, scheme: str, ignore: tuple[str, ...] = ()) -> list[str]:
    return list(vllm_doubts(plan_of(source, scheme, ignore=ignore)))


@pytest.mark.parametrize("family", ["gpt_bigcode", "gptj"])
def test_cache_scales_that_vllm_wants_under_another_name(tmp_path: Path, family: str) -> None:
    (doubt,) = told(save(family, tmp_path), "fp8-per-head")
    assert "looks for attn.k_scale" in doubt
    assert told(save(family, tmp_path), "fp8-dynamic") == []
    assert told(save("llama", tmp_path), "fp8-per-head") == []


@pytest.mark.parametrize("family", ["lfm2", "jamba", "zamba2"])
def test_cache_scales_that_vllm_refuses(tmp_path: Path, family: str) -> None:
    (doubt,) = told(save(family, tmp_path), "fp8-per-head")
    assert "no module or parameter named" in doubt
    assert told(save(family, tmp_path), "fp8-dynamic") == []


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Aria's fc1 [E, H, 2I] and fc2 [E, I, H] as Linears of each expert."""
    result = {}
    for name, tensor in tensors.items():
        experts, _, which = name.removesuffix(".weight").rpartition(".")
        if not experts.endswith(".experts"):
            result[name] = tensor
            continue
        for index, expert in enumerate(tensor.transpose(1, 2)):
            parts = expert.chunk(2) if which == "fc1" else (expert,)
            names = ("gate_proj", "up_proj") if which == "fc1" else ("down_proj",)
            for local, part in zip(names, parts, strict=True):
                result[f"{experts}.{index}.{local}.weight"] = part
    return result


def test_experts_whose_scales_vllm_loses(tmp_path: Path) -> None:
    source = save_variant(save("aria", tmp_path), tmp_path / "split", one_by_one, {})
    (doubt,) = told(source, "fp8-dynamic")
    assert "vLLM does not load quantized experts for Aria" in doubt
    assert "w13_weight_scale" in doubt
    assert ONE_BY_ONE in doubt
    assert told(source, "fp8-dynamic", ignore=("re:.*experts.*",)) == []


def test_experts_whose_scales_vllm_loads_are_no_doubt(tmp_path: Path) -> None:
    """Aria's own stay as one tensor; Mixtral's are quantized and load."""
    assert told(save("aria", tmp_path), "fp8-dynamic") == []
    assert told(save("mixtral", tmp_path), "fp8-dynamic") == []


def test_half_of_fused_experts_stays_whole_and_says_why(tmp_path: Path) -> None:
    """Without a gate_up_proj in transformers there is nothing to cut a down_proj by."""
    source = save("qwen3_vl_moe", tmp_path)
    tensors = load_file(source / "model.safetensors")
    renamed = {n.replace(".experts.gate_up_proj", ".experts.w13"): t for n, t in tensors.items()}
    write(tmp_path / "half", renamed, json.loads((source / "config.json").read_text()))
    whole = plan_of(tmp_path / "half", "fp8-dynamic").layout.whole_experts
    assert any(name.endswith("down_proj") for name in whole)
    assert all(whole.values())


@pytest.mark.parametrize("scheme", ["w4a16-g32", "nvfp4a16"])
def test_what_vllm_cuts_by_heads_stays_where_a_format_has_other_tensors(
    tmp_path: Path, scheme: str
) -> None:
    """Bloom's q, k and v: `weight_shape` and `weight_global_scale` have no heads."""
    plan = plan_of(save("bloom", tmp_path), scheme)
    assert not [n for n in plan.quantized if n.endswith("query_key_value")]
    assert [n for n in plan.quantized if n.endswith("self_attention.dense")]
    (line,) = plan.told
    assert "4 x self_attention.query_key_value [768, 256]: vLLM's BloomForCausalLM splits" in line
    assert line.endswith("use `--scheme fp8-dynamic`")


def test_what_vllm_merges_with_it_stays_as_well(tmp_path: Path) -> None:
    """TeleChat2's query beside its key_value."""
    plan = plan_of(save("telechat2", tmp_path), "w4a16-g32")
    assert {n.rpartition(".")[2] for n in plan.quantized} == {
        "dense", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert "TeleChat2ForCausalLM splits all its tensors by heads" in plan.told[0]


def test_what_vllm_cuts_by_heads_is_quantized_where_all_tensors_have_them(tmp_path: Path) -> None:
    plan = plan_of(save("bloom", tmp_path), "fp8-dynamic")
    assert [n for n in plan.quantized if n.endswith("query_key_value")]
    assert plan.told == ()
    neox = plan_of(save("gpt_neox", tmp_path), "w4a16-g32")
    assert [n for n in neox.quantized if n.endswith("query_key_value")]


def test_a_router_that_vllm_takes_the_dtype_of_stays(tmp_path: Path) -> None:
    """Gemma-3n: 1 / hidden_size in the dtype of its weight, which is 0 in FP8."""
    plan = plan_of(save("gemma3n_text", tmp_path), "fp8-dynamic")
    routers = [n for n in plan.layout.linears if n.endswith("altup.modality_router")]
    assert routers
    assert not set(routers) & set(plan.quantized)
    assert set(routers) <= set(plan.ignore)


def test_a_towers_merged_linears_are_ignored_by_vllms_name_as_well(tmp_path: Path) -> None:
    """LFM2-VL builds its tower before the language model tells of q, k and v."""
    ignore = plan_of(save("lfm2_vl", tmp_path), "fp8-dynamic").ignore
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn"
    assert f"{tower}.qkv_proj" in ignore
    assert f"model.{tower}.q_proj" in ignore
    assert not [n for n in ignore if n.startswith("model.language_model") and "qkv_proj" in n]


@pytest.mark.parametrize("family", ["qwen3_5_moe_hub", "kimi_linear", "zamba2", "opt", "mllama"])
def test_verify_finds_nothing_where_vllm_loads_all(tmp_path: Path, family: str) -> None:
    """Fused experts of an MTP block, layers of latent attention beside others, heads of a size of
    their own, an embedding of more tokens than the vocabulary has."""
    source = save(family, tmp_path / "sources")
    made = make(source, "fp8-dynamic", tmp_path / "out", write_token_ids(tmp_path / "ids.jsonl"))
    assert made.out is not None
    assert verify(made.out, source).findings == ()


def test_an_embedding_of_one_row_more_than_the_vocabulary_is_no_fault(tmp_path: Path) -> None:
    config = transformers.MoshiConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, ffn_dim=128,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.MoshiForCausalLM(config).bfloat16().save_pretrained(tmp_path / "moshi")
    made = make(tmp_path / "moshi", "fp8-dynamic", tmp_path / "out", tmp_path / "no.jsonl")
    assert made.out is not None, made.refusal
    assert verify(made.out).findings == ()


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "w4a16-g32"])
def test_a_family_that_vllm_alone_knows_has_decoder_layers(tmp_path: Path, scheme: str) -> None:
    """EXAONE, whose modules are called by one name in vLLM and look schemes up by another."""
    quantized = plan_of(save("exaone", tmp_path), scheme).quantized
    assert [n for n in quantized if n.endswith("attn.attention.q_proj")]
    assert [n for n in quantized if n.endswith("mlp.c_proj")]


def test_what_the_table_has_not_seen_is_ignored_by_its_merged_name_too(tmp_path: Path) -> None:
    """vLLM builds gate_up_proj of a dense layer among experts under that name alone."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, vocab_size=128,
        num_experts_per_tok=2, mlp_only_layers=[0], decoder_sparse_step=1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    plan = plan_of(tmp_path / "source", "fp8-dynamic")
    left = {name.rpartition(".")[2] for name in plan.ignore if ".layers.0.mlp." in name}
    assert left == {"gate_proj", "up_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["gpt_oss", "granite_swa"])
def test_attention_scales_that_transformers_cannot_run_are_told(
    tmp_path: Path, family: str
) -> None:
    """Sinks, for which it has eager attention alone. A KV-cache scheme it runs."""
    source = save(family, tmp_path)
    lines = transformers_doubts(plan_of(source, "fp8-per-head"))
    assert [line for line in lines if "only eager attention" in line]
    assert not list(transformers_doubts(plan_of(source, "kv-fp8-per-head")))
    llama = save("llama", tmp_path)
    assert not list(transformers_doubts(plan_of(llama, "fp8-per-head")))


def test_quantized_weights_that_layers_share_are_told(tmp_path: Path) -> None:
    """Zamba-2: transformers ties the codes, and not their scales."""
    lines = list(transformers_doubts(plan_of(save("zamba2", tmp_path), "fp8-dynamic")))
    assert [line for line in lines if "weights shared between layers" in line]


def test_attention_whose_scales_compressed_tensors_cannot_size(tmp_path: Path) -> None:
    """OPT's config has no num_key_value_heads, which those of `families.text` have."""
    source = tmp_path / "opt"
    config = transformers.OPTConfig(
        vocab_size=256, hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).bfloat16().save_pretrained(source)
    (line,) = transformers_doubts(plan_of(source, "kv-fp8-per-tensor"))
    assert "cannot read attention scales of OPTForCausalLM" in line
    assert "num_key_value_heads" in line
    assert not list(transformers_doubts(plan_of(source, "fp8-dynamic")))
    made = make(
        source, "kv-fp8-per-tensor", tmp_path / "out", write_token_ids(tmp_path / "ids.jsonl")
    )
    with pytest.raises(ValueError, match="Cannot determine num_key_value_heads"):
        transformers.OPTForCausalLM.from_pretrained(made.out)
