"""What a quantized source declares: which group a Linear falls to, and what is no group at all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ckptq.checkpoint.open import open_checkpoint
from ckptq.engines.vllm import group_of, ignores
from ckptq.errors import SourceError
from ckptq.recipes.args import Args
from ckptq.recipes.declared import declared, read_declared


@pytest.fixture
def write(tmp_path):
    """A checkpoint with this quantization_config."""
    save_file({"w.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")

    def write(config):
        text = json.dumps({"model_type": "llama", "quantization_config": config})
        (tmp_path / "config.json").write_text(text)
        return open_checkpoint(tmp_path)

    return write


@pytest.fixture
def declare(write):
    """What such a checkpoint declares."""
    return lambda config: declared(write(config))


def group(*targets, **more):
    return {"targets": list(targets), "weights": {"num_bits": 8}, **more}


def test_names_and_patterns_go_before_the_class(declare):
    found = declare(
        {"config_groups": {"all": group("Linear"), "k": group("re:.*k_proj", "a.v_proj")}}
    )
    named = {name: group_of(found, name) for name in ("a.k_proj", "a.v_proj", "a.q_proj")}
    assert {name: each.name for name, each in named.items()} == {
        "a.k_proj": "k", "a.v_proj": "k", "a.q_proj": "all",
    }  # fmt: skip
    alone = declare({"config_groups": {"k": group("re:.*k_proj")}})
    assert group_of(alone, "a.q_proj") is None


def test_the_name_of_the_merged_linear_names_its_parts(declare):
    """vLLM looks it up; whoever reads a config has to find the same group."""
    groups = {"rest": group("Linear"), "qkv": group(r"re:.*self_attn\.qkv_proj$")}
    found = declare({"config_groups": groups, "ignore": ["a.mlp.gate_up_proj"]})
    for part in ("q_proj", "k_proj", "v_proj"):
        assert group_of(found, f"a.self_attn.{part}").name == "qkv"
    assert group_of(found, "a.self_attn.o_proj").name == "rest"
    assert group_of(found, "a.mlp.up_proj") is None
    assert ignores(found, "a.mlp.gate_proj")


def test_what_is_ignored_is_in_no_group(declare):
    found = declare({"config_groups": {"all": group("Linear")}, "ignore": ["re:.*lm_head", "a.b"]})
    assert group_of(found, "a.b") is None
    assert group_of(found, "lm_head") is None
    assert group_of(found, "a.b.c").name == "all"


def test_groups_of_attention_quantize_no_weights(declare):
    inputs = {"num_bits": 8, "type": "float"}
    group_a = group("LlamaAttention", weights=None, input_activations=inputs)
    found = declare({"config_groups": {"a": group_a}})
    assert found.linears == ()
    assert [each.name for each in found.groups] == ["a"]
    assert found.attention == Args(type="float")


def test_no_config_has_no_groups(declare):
    assert declare(None).groups == ()
    assert declare({}).groups == ()
    assert not declare(None).present


def test_fp8_of_other_tools_is_a_group_of_all_linears(declare):
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 64]}
    found = group_of(declare(fp8), "a.q_proj")
    assert str(found.weight_scheme()) == "fp8 block 128x64"
    assert (found.inputs.dynamic, found.inputs.group_size) == (True, 64)
    found = group_of(declare({"quant_method": "fp8", "activation_scheme": "static"}), "a.q_proj")
    assert str(found.weight_scheme()) == "fp8 tensor"
    assert found.input_scale == "input_scale"


def test_what_is_read_is_written_as_it_was():
    """In its order, without what says nothing; what is changed stands where it stood."""
    said = {"type": "float", "num_bits": 8, "observer": None, "strategy": "block",
            "block_structure": [128, 128], "scale_dtype": "torch.uint8"}  # fmt: skip
    args = Args.read(said)
    kept = {key: value for key, value in said.items() if value is not None}
    assert json.dumps(args.to_dict()) == json.dumps(kept)
    changed = replace(args, strategy="channel", block_structure=None, symmetric=False).to_dict()
    assert list(changed) == ["type", "num_bits", "strategy", "scale_dtype", "symmetric"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"config_groups": 1},
            r"json: quantization_config\.config_groups is 1, expected an",
        ),
        ({"config_groups": {"g": [1]}}, r"config_groups\.g is \[1\], expected an object"),
        ({"config_groups": {"g": group([1])}}, r"g\.targets is \[1\], expected a name"),
        ({"config_groups": {"g": group("re:(")}}, r"g\.targets is 're:\(', expected a regular"),
        ({"config_groups": {"g": group(weights=3)}}, r"config_groups\.g\.weights is 3"),
        ({"config_groups": {"g": group(input_activations="x")}}, r"input_activations is 'x'"),
        ({"config_groups": {"g": group(weights={"num_bits": "4"})}}, r"weights\.num_bits is '4'"),
        ({"kv_cache_scheme": ["fp8"]}, r"kv_cache_scheme is \['fp8'\], expected an object"),
        ({"ignore": "lm_head"}, r"ignore is 'lm_head', expected a list of names"),
    ],
)
def test_what_is_odd_is_named(declare, config, said):
    with pytest.raises(SourceError, match=said):
        declare(config)


def test_every_problem_is_told_to_a_reader_that_goes_on(write):
    odd = {"num_bits": "4", "type": "float", "symmetric": "yes"}
    groups = {"g": group("re:(", 1, "a", weights=odd), "h": 3}
    told = []
    found = read_declared(
        write({"config_groups": groups, "kv_cache_scheme": 8}), lambda *each: told.append(each[0])
    )
    assert told == [
        *("config_groups.g.targets", "config_groups.g.targets"),
        *("config_groups.g.weights.num_bits", "config_groups.g.weights.symmetric"),
        *("config_groups.h", "kv_cache_scheme"),
    ]
    assert found.groups[0].targets == ("re:(", "a")
    assert found.groups[0].weights.type == "float"
    assert found.groups[0].scheme is None, "what is odd stands for no weights"


@pytest.mark.parametrize("odd", [128, [128], ["a", "b"], [128, 0], [True, True]])
def test_blocks_are_two_whole_numbers(declare, odd):
    with pytest.raises(SourceError, match=r"weight_block_size is .*, expected two whole numbers"):
        declare({"quant_method": "fp8", "weight_block_size": odd})
