"""What a recipe does to each family, decided from headers alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny.plans import plan_of

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import PlanError, SourceError, UsageError
from ckptq.models.heads import heads_in
from ckptq.models.witnesses import read_witnesses
from ckptq.plan.doubts import vllm_doubts
from ckptq.plan.make import make_plan
from ckptq.plan.shards import fill_shards
from ckptq.plan.unit import Plan, Unit
from ckptq.recipes.load import load_text
from ckptq.recipes.names import read_names
from ckptq.spec import TensorSpec


def rules(plan: Plan) -> dict[str, str]:
    return {unit.key: unit.rule for unit in plan.units}


def recipe(groups: str, ignore: str = "[]") -> str:
    return f"""
quantization_stage:
  quantization_modifiers:
    QuantizationModifier:
      ignore: {ignore}
      config_groups: {groups}
"""


def test_every_source_tensor_is_in_exactly_one_unit(llama4: Path) -> None:
    ckpt = open_checkpoint(llama4)
    plan = plan_of(llama4, "fp8-dynamic")
    slabs = {p.linear.weight.stored.name for u in plan.units for p in u.parts}
    copied = [name for u in plan.units for name in u.copies]
    assert slabs.isdisjoint(copied)
    assert slabs | set(copied) == set(ckpt.tensors)
    assert len(copied) == len(set(copied))


def test_what_is_never_quantized_says_why(llama4: Path) -> None:
    found = rules(plan_of(llama4, "fp8-dynamic"))
    assert found["language_model.lm_head.weight"] == "output head"
    assert found["multi_modal_projector.linear_1.weight"] == "projector"
    assert found["vision_model.model.layers.0.self_attn.q_proj.weight"] == "vision tower"
    assert found["language_model.model.layers.1.feed_forward.router.weight"] == "router"
    assert found["language_model.model.layers.0.input_layernorm.weight"] == "norm"


def test_fused_experts_are_cut_into_transposed_linears(llama4: Path) -> None:
    plan = plan_of(llama4, "fp8-dynamic")
    experts = "language_model.model.layers.1.feed_forward.experts"
    units = {unit.key: unit for unit in plan.units}
    for expert in range(4):
        writes = units[f"{experts}.{expert}.gate_proj"].writes
        assert writes[f"{experts}.{expert}.gate_proj.weight"] == TensorSpec("F8_E4M3", (256, 128))
        assert writes[f"{experts}.{expert}.up_proj.weight_scale"] == TensorSpec("BF16", (256, 1))
        down = units[f"{experts}.{expert}.down_proj"].writes
        assert down[f"{experts}.{expert}.down_proj.weight"] == TensorSpec("F8_E4M3", (128, 256))


def test_experts_left_as_a_whole_stay_fused_and_are_ignored_by_a_pattern(llama4: Path) -> None:
    experts = "language_model.model.layers.1.feed_forward.experts"
    plan = plan_of(llama4, "fp8-dynamic", ignore=["re:.*experts.*"])
    assert f"{experts}.gate_up_proj" in rules(plan)
    pattern = next(name for name in plan.ignore if name.startswith("re:"))
    assert re.match(pattern.removeprefix("re:"), f"{experts}.0.gate_proj")
    assert not re.match(pattern.removeprefix("re:"), experts.replace("experts", "shared_expert"))


def test_layers_that_are_stored_transposed_are_refused(llama: Path) -> None:
    """GPT-2's weights have the shapes of Linears, and would be scaled along the wrong axis."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(PlanError, match=r"gpt2 stores its layers as \[in, out\]"):
        plan_of(llama, "fp8-dynamic")


@pytest.mark.parametrize("pattern", ["re:.*self_atn", "*.q_proj", "Linear", "", "self_attn.q_proj"])
def test_an_ignore_that_matches_nothing_is_refused(llama: Path, pattern: str) -> None:
    """A typo must not quantize what was to be left alone."""
    with pytest.raises(PlanError, match=re.escape(f"--ignore {pattern!r}: matches no Linear")):
        plan_of(llama, "fp8-dynamic", ignore=["re:.*self_attn", pattern])


def test_an_ignore_that_is_no_pattern_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"--ignore 're:\.\*\(': not a regular expression"):
        plan_of(llama, "fp8-dynamic", ignore=["re:.*("])


def test_a_head_that_is_not_stored_may_be_ignored(llama4: Path) -> None:
    for ignore in ("lm_head", "re:.*lm_head", "language_model.lm_head"):
        plan_of(llama4, "fp8-dynamic", ignore=[ignore])


def test_one_quantized_expert_splits_all_fused_layers(llama4: Path) -> None:
    """vLLM's loader cannot read fused experts beside experts one by one."""
    experts = "language_model.model.layers.1.feed_forward.experts"
    plan = plan_of(llama4, "fp8-dynamic", ignore=[r"re:.*experts\.[123]\."])
    units = {unit.key: unit for unit in plan.units}
    assert units[f"{experts}.0.gate_proj"].parts
    assert units[f"{experts}.1.gate_proj"].views
    assert f"{experts}.1.gate_proj" in plan.ignore
    assert f"{experts}.0.gate_proj" not in plan.ignore


@pytest.mark.parametrize("left", ["down_proj", "gate_proj|up_proj"])
@pytest.mark.parametrize("family", ["llama4"])
def test_a_projection_of_fused_experts_that_is_left_is_ignored_alone(
    request: pytest.FixtureRequest, family: str, left: str
) -> None:
    """A pattern for all of them would tell engines that the quantized ones are not."""
    plan = plan_of(request.getfixturevalue(family), "fp8-dynamic", ignore=[rf"re:.*({left})$"])
    quantized = {name for names in plan.groups.values() for name in names}
    assert any(".experts." in name for name in quantized)
    assert not [n for n in quantized if read_names(plan.ignore).match(n)]
    left_alone = [n for n in plan.layout.linears if ".experts." in n and n not in quantized]
    assert left_alone
    assert set(left_alone) <= set(plan.ignore)
    assert [doubt for doubt in vllm_doubts(plan) if "experts are not all quantized alike" in doubt]


def test_experts_that_are_quantized_alike_or_not_at_all_are_no_doubt(llama4: Path) -> None:
    assert not list(vllm_doubts(plan_of(llama4, "fp8-dynamic")))
    assert not list(vllm_doubts(plan_of(llama4, "fp8-dynamic", ignore=["re:.*experts.*"])))


def test_experts_with_biases_stay_whole(gpt_oss: Path) -> None:
    """vLLM has no place for the bias of one expert, and loads the fused tensors as they are."""
    plan = plan_of(gpt_oss, "fp8-dynamic")
    found = {name for unit in plan.units for name in unit.writes}
    experts = "model.layers.0.mlp.experts"
    assert {f"{experts}.gate_up_proj", f"{experts}.gate_up_proj_bias"} <= found
    assert not [name for name in found if name.startswith(f"{experts}.0.")]
    assert rf"re:{re.escape(experts)}\..*" in plan.ignore


def test_multi_token_prediction_layers_stay(deepseek: Path) -> None:
    """num_hidden_layers is 2; layer 2 on disk is the prediction layer."""
    found = rules(plan_of(deepseek, "fp8-dynamic"))
    assert found["model.layers.1.mlp.experts.0.gate_proj"].startswith("linear: ")
    name = "model.layers.2.mlp.experts.0.gate_proj.weight"
    assert found[name] == "multi-token prediction layer"
    assert found["model.layers.1.mlp.gate.weight"] == "router"


def test_latent_attention_is_refused_by_name(deepseek: Path) -> None:
    with pytest.raises(PlanError, match="multi-head latent attention"):
        plan_of(deepseek, "fp8-per-head")


def test_a_model_without_attention_heads_is_refused(mamba: Path) -> None:
    with pytest.raises(PlanError, match="no attention heads"):
        plan_of(mamba, "kv-fp8-per-head")


@pytest.mark.parametrize(
    "declared",
    [
        {"layer_types": ["linear_attention", "full_attention"]},
        {"layer_types": ["conv", "sliding_attention"]},
        {"linear_attn_config": {"kda_layers": [1], "full_attn_layers": [2]}},
    ],
)
def test_layers_that_keep_a_state_have_no_cache(llama: Path, declared: dict[str, object]) -> None:
    """MiniMax and Kimi-Linear call the projections of linear attention as those of attention."""
    file = llama / "config.json"
    config = json.loads(file.read_text())
    plan = plan_of(llama, "fp8-per-head").attention
    assert plan is not None
    assert len(plan.scales) == 2
    file.write_text(json.dumps(config | declared))
    plan = plan_of(llama, "fp8-per-head").attention
    assert plan is not None
    assert list(plan.scales) == ["model.layers.1.self_attn"]


def test_heads_of_a_layer_are_those_of_its_shapes(mimo: Path) -> None:
    plan = plan_of(mimo, "fp8-per-head", permutable=False).attention
    assert plan is not None
    found = {
        name: spec.shape[0] for scales in plan.scales.values() for name, spec in scales.items()
    }
    assert found == {
        f"model.layers.{index}.self_attn.{which}_scale": count
        for index, counts in enumerate([(4, 2, 2), (4, 4, 4)])
        for which, count in zip("qkv", counts, strict=True)
    }


@pytest.mark.parametrize(
    ("shapes", "heads"),
    [
        ({"o_proj": (128, 128), "v_proj": (32, 128)}, (4, 1)),
        ({"o_proj": (128, 128), "k_proj": (32, 128)}, (4, 1)),
        ({"o_proj": (128, 128), "k_proj": (64, 128), "v_proj": (128, 128)}, (4, 4)),
        ({"o_proj": (128, 130), "v_proj": (32, 128)}, (4, 2)),
        ({"o_proj": (128, 128), "v_proj": (33, 128)}, (4, 2)),
        ({"o_proj": (128, 128), "v_proj": (96, 128)}, (4, 2)),
        ({"o_proj": (128, 128), "qkv_proj": (256, 128)}, (4, 2)),
        ({"v_proj": (32, 128)}, (4, 2)),
    ],
)
def test_shapes_that_tell_no_heads_leave_it_to_the_config(
    shapes: dict[str, tuple[int, int]], heads: tuple[int, int]
) -> None:
    assert heads_in("a", (4, 2), {f"a.{name}": shape for name, shape in shapes.items()}) == heads


def test_longcat_counts_its_layers_elsewhere(llama: Path) -> None:
    """Two attentions a layer, and num_hidden_layers counts those."""
    file = llama / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "longcat_flash", "num_layers": 2}
    file.write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert read_witnesses(open_checkpoint(llama)).num_layers == 2


def test_scales_get_their_shapes_from_the_heads(llama: Path) -> None:
    per_head = plan_of(llama, "fp8-per-head").attention
    per_tensor = plan_of(llama, "kv-fp8-per-tensor").attention
    assert per_head is not None
    assert per_tensor is not None
    module = "model.layers.1.self_attn"
    assert per_head.scales[module] == {
        f"{module}.q_scale": TensorSpec("BF16", (4, 1, 1)),
        f"{module}.k_scale": TensorSpec("BF16", (2, 1, 1)),
        f"{module}.v_scale": TensorSpec("BF16", (2, 1, 1)),
    }
    assert per_tensor.scales[module][f"{module}.q_scale"] == TensorSpec("BF16", (1,))


def test_kv_only_copies_every_weight(llama: Path) -> None:
    plan = plan_of(llama, "kv-fp8-per-head")
    assert {n for u in plan.units for n in u.copies} == set(open_checkpoint(llama).tensors)
    assert plan.ignore == ()


def test_a_fused_set_must_agree(llama: Path) -> None:
    with pytest.raises(PlanError, match=r"fused set.*q_proj: left alone.*k_proj: linear"):
        plan_of(llama, "fp8-dynamic", ignore=["model.layers.0.self_attn.q_proj"])


def test_per_tensor_formats_keep_a_fused_set_in_one_unit(llama: Path) -> None:
    units = {u.key: u for u in plan_of(llama, "fp8-static").units}
    (qkv,) = [u for u in units.values() if len(u.parts) == 3 and ".0.self_attn." in u.key]
    assert [p.linear.projection for p in qkv.parts] == ["q_proj", "k_proj", "v_proj"]
    assert "model.layers.0.self_attn.q_proj.input_scale" in qkv.scales


def test_mixed_recipes_prefer_names_to_classes(llama: Path) -> None:
    mixed = recipe(
        r"{mlp: {targets: [Linear], weights: {num_bits: 8, type: int, strategy: channel},"
        r" input_activations: {num_bits: 8, type: int, strategy: token, dynamic: true}},"
        r" attention: {targets: ['re:.*self_attn\..*_proj$'],"
        r" weights: {num_bits: 4, type: int, strategy: group, group_size: 32}}}",
        "[lm_head]",
    )
    plan = make_plan(open_checkpoint(llama), load_text("mixed", mixed))
    assert all(".self_attn." in name for name in plan.groups["attention"])
    assert all(".mlp." in name for name in plan.groups["mlp"])
    assert len(plan.groups["attention"]) == 8
    assert len(plan.groups["mlp"]) == 6


def test_a_target_that_matches_nothing_is_refused(llama: Path) -> None:
    lost = recipe("{g: {targets: ['re:.*experts.*'], weights: {num_bits: 8, type: float}}}")
    with pytest.raises(PlanError, match=r"group 'g' with targets .* matched no Linear"):
        make_plan(open_checkpoint(llama), load_text("lost", lost))


def test_the_output_head_is_quantized_only_by_name(llama: Path) -> None:
    head = recipe("{g: {targets: ['re:.*lm_head'], weights: {num_bits: 8, type: float}}}")
    plan = make_plan(open_checkpoint(llama), load_text("head", head))
    assert plan.groups["g"] == ("lm_head",)


@pytest.mark.parametrize("scheme", ["w4a16-asym", "fp8-block"])
def test_llama4_attention_gets_a_format_that_engines_can_permute(llama4: Path, scheme: str) -> None:
    plan = plan_of(llama4, scheme)
    parts = {p.linear.name: p.scheme for u in plan.units for p in u.parts}
    qkv = [s for n, s in parts.items() if re.search(r"self_attn\.[qkv]_proj$", n)]
    assert len(qkv) == 6
    assert all(s.symmetric and s.strategy in ("channel", "group") for s in qkv)
    others = [s for n, s in parts.items() if ".feed_forward." in n]
    assert any(not s.symmetric or s.strategy == "block" for s in others)


def test_as_written_leaves_llama4_attention_to_the_user(llama4: Path) -> None:
    plan = plan_of(llama4, "w4a16-asym", permutable=False)
    assert not any(p.scheme.symmetric for u in plan.units for p in u.parts)


def test_ignored_attention_needs_no_group_of_its_own(llama4: Path) -> None:
    plan = plan_of(llama4, "fp8-block", ignore=["re:.*self_attn"])
    assert list(plan.groups) == ["linear"]


def test_shards_are_filled_in_order() -> None:
    """6, 6, 2, 6 bytes with 10-byte shards land in shards 1, 2, 2, 3."""
    units = [Unit(key=str(i), rule="", scales={str(i): TensorSpec("U8", (n,))})
             for i, n in enumerate((6, 6, 2, 6))]  # fmt: skip
    shards = fill_shards(units, 10)
    assert [[u.key for u in run] for run in shards.values()] == [["0"], ["1", "2"], ["3"]]
    assert next(iter(shards)) == "model-00001-of-00003.safetensors"


def test_a_single_shard_has_the_plain_name() -> None:
    assert list(fill_shards([Unit(key="a", rule="")], 10)) == ["model.safetensors"]


def test_blocks_that_vllm_would_split_are_told(llama: Path) -> None:
    """k has 64 rows beside q's 128: half a block, between two members of a merged layer."""
    doubt, *others = vllm_doubts(plan_of(llama, "fp8-block", permutable=False))
    assert not others
    assert "self_attn.k_proj: 64)" in doubt
    assert not list(vllm_doubts(plan_of(llama, "fp8-dynamic")))
    alone = plan_of(llama, "fp8-block", ignore=(r"re:.*\.(q|k|v)_proj$",), permutable=False)
    assert not list(vllm_doubts(alone))
    left = plan_of(llama, "fp8-block")
    assert not list(vllm_doubts(left))
    assert {n for n in left.ignore if "layers.1." in n} == {
        f"model.layers.1.self_attn.{side}_proj" for side in "qkv"
    }


def test_what_vllm_cannot_permute_is_told(llama4: Path) -> None:
    for scheme in ("w4a16-asym", "fp8-block"):
        assert not [d for d in vllm_doubts(plan_of(llama4, scheme)) if "permute" in d]
        told = vllm_doubts(plan_of(llama4, scheme, permutable=False))
        assert any("does not permute" in d for d in told)
    assert not list(vllm_doubts(plan_of(llama4, "w4a16", permutable=False)))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantization_config_that_is_no_object_is_refused(llama: Path, key: str) -> None:
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "fp8"}))
    for scheme in ("fp8-dynamic", "fp8-per-head"):
        with pytest.raises(SourceError, match=f"config.json: {key} is a str, expected an object"):
            plan_of(llama, scheme)
