"""What a module is, from names on disk, transformers' tree and vLLM's table: each can object."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families.sources import save
from safetensors.torch import load_file, save_file
from tiny.plans import plan_of

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.models.witnesses import UNKNOWN, read_witnesses
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme, load_text

NAMED = """
quantization_stage:
  quantization_modifiers:
    QuantizationModifier:
      config_groups:
        linear:
          targets: ["re:.*mlp.down_proj$"]
          weights: {num_bits: 8, type: float, strategy: channel, symmetric: true}
"""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """A copy with other entries in its config.json."""
    to.mkdir()
    found = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(found | config))
    save_file(load_file(folder / "model.safetensors"), to / "model.safetensors")
    return to


@pytest.mark.parametrize("family", ["gemma2", "cohere2", "lfm2_moe", "falcon"])
def test_a_tied_head_is_in_ignore(families: Path, family: str) -> None:
    """It has no tensor, and transformers makes a Linear of it."""
    folder = save(family, families)
    assert not any("lm_head" in name for name in open_checkpoint(folder).tensors)
    assert "lm_head" in plan_of(folder).ignore


def test_every_linear_of_transformers_is_quantized_or_in_ignore(families: Path) -> None:
    for family in ("mistral3", "qwen3_5", "nemotron_h", "jamba"):
        ckpt = open_checkpoint(save(family, families))
        plan, tree = make_plan(ckpt, load_scheme("fp8-dynamic")), read_witnesses(ckpt).tree
        assert tree is not None
        done = {tree.module(name) for name in plan.quantized}
        assert set(tree.linears) <= done | {*plan.ignore}, family


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("jamba", r".*\.mamba\.(in|out|dt|x)_proj"),
        ("granitemoe", r".*\.router\.layer"),
        ("gemma4_moe", r".*\.router\.proj"),
        ("hunyuan_moe", r".*\.gate\.wg"),
        ("qwen3_moe", r".*\.mlp\.gate"),
    ],
)
def test_what_vllm_never_quantizes_stays(families: Path, family: str, pattern: str) -> None:
    plan = plan_of(save(family, families))
    assert plan.quantized
    assert not [name for name in plan.quantized if re.fullmatch(pattern, name)]


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_experts_that_stay_whole_are_in_ignore(families: Path, family: str) -> None:
    """vLLM looks for their scheme under the name of expert 0, whatever lies on disk."""
    plan = plan_of(save(family, families))
    assert plan.layout.whole_experts
    engine = plan.layout.witnesses.engine
    assert engine is not None
    for name in plan.layout.whole_experts:
        experts = engine.experts(name)
        assert experts is not None
        assert {*experts.lookups} <= {*plan.ignore}


@pytest.mark.parametrize("turned", [False, True])
def test_orientation_comes_from_shapes(families: Path, tmp_path: Path, turned: bool) -> None:
    """[E, H, 2I] and [E, 2I, H] under one model_type are cut to the same Linears."""
    folder = save("llama4", families)
    if turned:
        folder = with_experts(folder, tmp_path / "turned", lambda w: w.transpose(1, 2).contiguous())
    plan = plan_of(folder)
    config = json.loads((folder / "config.json").read_text())["text_config"]
    I, H = config["intermediate_size"], config["hidden_size"]
    for name, linear in plan.layout.linears.items():
        if ".experts." in name:
            out = (H, I) if linear.projection == "down_proj" else (I, H)
            assert linear.weight.spec.shape == out


def test_experts_of_another_size_are_refused(families: Path, tmp_path: Path) -> None:
    folder = with_experts(save("llama4", families), tmp_path / "cut", lambda w: w[:, 1:, 1:])
    with pytest.raises(SourceError, match=r"config\.json declares experts with hidden size"):
        plan_of(folder)


def with_experts(folder: Path, to: Path, change: Any) -> Path:
    changed(folder, to)
    tensors = load_file(to / "model.safetensors")
    for name, weight in tensors.items():
        if weight.dim() == 3 and ".experts." in name:
            tensors[name] = change(weight).contiguous()
    save_file(tensors, to / "model.safetensors")
    return to


def test_sets_that_vllm_merges_are_those_of_its_table(families: Path) -> None:
    folder = save("qwen3_5", families)
    with pytest.raises(PlanError, match=r"fused set must be quantized alike.*in_proj_z"):
        plan_of(folder, ignore=["re:.*in_proj_z"])
    plan_of(folder, ignore=["re:.*in_proj_(z|qkv)$"])


def test_a_model_that_nobody_knows_is_refused_unless_a_recipe_names_it(
    families: Path, tmp_path: Path
) -> None:
    own = {"architectures": ["OwnForCausalLM"], "model_type": "own"}
    folder = changed(save("llama", families), tmp_path / "own", **own)
    with pytest.raises(PlanError, match=r"OwnForCausalLM: unknown to both transformers and"):
        plan_of(folder)
    ckpt = open_checkpoint(folder)
    plan = make_plan(ckpt, load_text("named", NAMED))
    assert len(plan.quantized) == ckpt.config["num_hidden_layers"]
    assert read_witnesses(ckpt).why_kept("model.layers.0.mlp.down_proj") == UNKNOWN


def test_a_module_that_the_engine_does_not_know_stays(families: Path, tmp_path: Path) -> None:
    folder = changed(save("llama", families), tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.own_proj.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    plan = plan_of(folder)
    assert "model.layers.0.self_attn.own_proj" in plan.ignore
    assert "model.layers.0.self_attn.own_proj" not in plan.quantized
