"""What a quantized source declares: which group a Linear falls to, and what is no group at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import SourceError
from ckptq.models.config_groups import block_structure, config_groups, group_of, stored_groups


@pytest.fixture
def declare(tmp_path):
    """A checkpoint with this quantization_config."""
    save_file({"w.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")

    def write(config):
        text = json.dumps({"model_type": "llama", "quantization_config": config})
        (tmp_path / "config.json").write_text(text)
        return open_checkpoint(tmp_path)

    return write


def group(*targets, **more):
    return {"targets": list(targets), "weights": {"num_bits": 8}, **more}


def test_names_and_patterns_go_before_the_class(declare):
    groups = config_groups(
        declare({"config_groups": {"all": group("Linear"), "k": group("re:.*k_proj", "a.v_proj")}})
    )
    found = {name: group_of(groups, name) for name in ("a.k_proj", "a.v_proj", "a.q_proj")}
    assert {name: each.name for name, each in found.items()} == {
        "a.k_proj": "k", "a.v_proj": "k", "a.q_proj": "all",
    }  # fmt: skip
    assert group_of(groups[1:], "a.q_proj") is None


def test_groups_of_attention_quantize_no_weights(declare):
    ckpt = declare({"config_groups": {"a": group("LlamaAttention", weights=None)}})
    assert config_groups(ckpt) == ()
    assert list(stored_groups(ckpt)) == ["a"]


def test_no_config_has_no_groups(declare):
    assert config_groups(declare(None)) == ()
    assert block_structure(declare({"weight_block_size": [128, 64]})) == (128, 64)
    assert block_structure(declare({})) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"config_groups": 1}, r"config\.json: quantization_config\.config_groups is 1, wanted an"),
        ({"config_groups": {"g": [1]}}, r"config_groups\.g is \[1\], wanted an object"),
        ({"config_groups": {"g": group([1])}}, r"g\.targets is \[\[1\]\], wanted a list of names"),
        ({"config_groups": {"g": group("re:(")}}, r"g\.targets is 're:\(', wanted a pattern that"),
        ({"config_groups": {"g": group(weights=3)}}, r"config_groups\.g\.weights is 3"),
        ({"config_groups": {"g": group(input_activations="x")}}, r"input_activations is 'x'"),
    ],
)
def test_what_is_odd_is_named(declare, config, said):
    with pytest.raises(SourceError, match=said):
        config_groups(declare(config))


@pytest.mark.parametrize("odd", [128, [128], ["a", "b"], [128, 0], [True, True]])
def test_blocks_are_two_whole_numbers(declare, odd):
    with pytest.raises(SourceError, match=r"weight_block_size is .*, wanted two whole numbers"):
        block_structure(declare({"weight_block_size": odd}))
