"""Mixed recipes: the merged Linears of vLLM find the group of their parts, in old and new."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.documents import quantization_config
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_text

INT8 = "{num_bits: 8, type: int, strategy: channel, symmetric: true}"
FP8 = "{num_bits: 8, type: float, strategy: channel, symmetric: true}"
RECIPE = f"""
quantization_stage:
  quantization_modifiers:
    QuantizationModifier:
      ignore: [lm_head]
      config_groups:
        attention: {{targets: ["re:.*self_attn.(q|k|v|o)_proj$"], weights: {INT8}}}
        gates: {{targets: ["re:.*mlp.(gate|up)_proj$"], weights: {INT8}}}
        rest: {{targets: [Linear], weights: {FP8}}}
"""
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

Rule = Callable[[str, str, Sequence[str]], str | None]


def by_name(name: str, _: str, targets: Sequence[str]) -> str | None:
    return next(
        (t for t in targets if t == name or (t[:3] == "re:" and re.match(t[3:], name))), None
    )


def by_class(_: str, kind: str, targets: Sequence[str]) -> str | None:
    return next((t for t in targets if t.lower() in kind.lower()), None)


def by_parts(name: str, kind: str, targets: Sequence[str]) -> str | None:
    parent, _, last = name.rpartition(".")
    found = [by_name(f"{parent}.{part}", kind, targets) for part in MERGED.get(last, [])]
    return found[0] if found and all(found) else None


ORDER: Mapping[str, tuple[Rule, ...]] = {
    "0.25": (by_name, by_class, by_parts),
    "0.32": (by_name, by_parts, by_class),
}
"""find_matched_target of vLLM's compressed_tensors/utils.py, by version."""


def group_of(version: str, name: str, groups: Mapping[str, Any]) -> str:
    """The group whose target vLLM takes for a module; a merged one is a QKVParallelLinear."""
    targets = {t: g for g, group in groups.items() for t in group["targets"]}
    rules = ORDER[version]
    found = (rule(name, "QKVParallelLinear", list(targets)) for rule in rules)
    return targets[next(target for target in found if target)]


@pytest.mark.parametrize("version", ORDER)
def test_merged_linears_find_the_group_of_their_parts(llama: Path, version: str) -> None:
    plan = make_plan(open_checkpoint(llama), load_text("mixed", RECIPE))
    groups = quantization_config(plan, None)["quantization_config"]["config_groups"]
    layer = "model.layers.1"
    assert group_of(version, f"{layer}.self_attn.qkv_proj", groups) == "attention"
    assert group_of(version, f"{layer}.self_attn.o_proj", groups) == "attention"
    assert group_of(version, f"{layer}.mlp.gate_up_proj", groups) == "gates"
    assert group_of(version, f"{layer}.mlp.down_proj", groups) == "rest"


def test_with_the_recipe_s_targets_alone_the_older_one_goes_wrong(llama: Path) -> None:
    plan = make_plan(open_checkpoint(llama), load_text("mixed", RECIPE))
    asked = {g.name: {"targets": g.targets} for g in plan.recipe.groups}
    merged = "model.layers.1.self_attn.qkv_proj"
    assert group_of("0.25", merged, asked) == "rest"
    assert group_of("0.32", merged, asked) == "attention"


def test_one_group_keeps_its_targets_as_the_recipe_has_them(llama: Path) -> None:
    text = RECIPE.replace(f"        rest: {{targets: [Linear], weights: {FP8}}}\n", "")
    plan = make_plan(open_checkpoint(llama), load_text("named", text))
    groups = quantization_config(plan, None)["quantization_config"]["config_groups"]
    assert {name: g["targets"] for name, g in groups.items()} == {
        g.name: list(g.targets) for g in plan.recipe.groups
    }
