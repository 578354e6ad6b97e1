"""What vLLM does not load of some families, told by the plan from the engines' table alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptq.checkpoint.open import open_checkpoint
from ckptq.plan.doubts import vllm_doubts
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme
from families.sources import save, save_variant, write

ONE_BY_ONE = "--ignore 're:.*experts.*' leaves them as they are"


def told(source: Path, scheme: str, ignore: tuple[str, ...] = ()) -> list[str]:
    plan = make_plan(open_checkpoint(source), load_scheme(scheme), ignore=ignore)
    return list(vllm_doubts(plan))


@pytest.mark.parametrize("family", ["gpt_bigcode", "gptj"])
def test_cache_scales_that_vllm_wants_under_another_name(tmp_path: Path, family: str) -> None:
    (doubt,) = told(save(family, tmp_path), "fp8-per-head")
    assert "looks for attn.k_scale" in doubt
    assert told(save(family, tmp_path), "fp8-dynamic") == []
    assert told(save("llama", tmp_path), "fp8-per-head") == []


@pytest.mark.parametrize("family", ["lfm2", "jamba"])
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
    assert "vLLM does not load quantized experts of Aria" in doubt
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
    plan = make_plan(open_checkpoint(tmp_path / "half"), load_scheme("fp8-dynamic"))
    assert all(plan.layout.whole_experts.values())
