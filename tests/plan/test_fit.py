"""Widths that a format cannot hold: what is left, with what else, and what is said of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from plan_shapes import Save, weights
from tiny.plans import plan_of

from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import PlanError, UsageError
from ckptq.plan.unit import Plan
from ckptq.recipes.group_size import SIZES, with_group_size
from ckptq.recipes.load import load_scheme, load_text
from ckptq.recipes.scheme import Recipe
from ckptq.verify.run import verify

Shapes = list[tuple[str, tuple[int, ...]]]
BLOCKS = "num_bits: 8, type: float, strategy: block, block_structure: [128, 128]"


def olmo(hidden: int, intermediate: int, kv_rows: int = 64, layers: int = 3) -> Shapes:
    """Names of a family that no case file has, and biases nowhere."""
    shapes: Shapes = [("model.embed_tokens.weight", (64, hidden)), ("model.norm.weight", (hidden,))]
    for index in range(layers):
        layer = f"model.layers.{index}"
        shapes += [
            (f"{layer}.self_attn.q_proj.weight", (128, hidden)),
            (f"{layer}.self_attn.k_proj.weight", (kv_rows, hidden)),
            (f"{layer}.self_attn.v_proj.weight", (kv_rows, hidden)),
            (f"{layer}.self_attn.o_proj.weight", (hidden, 128)),
            (f"{layer}.mlp.gate_proj.weight", (intermediate, hidden)),
            (f"{layer}.mlp.up_proj.weight", (intermediate, hidden)),
            (f"{layer}.mlp.down_proj.weight", (hidden, intermediate)),
            (f"{layer}.post_attention_layernorm.weight", (hidden,)),
        ]
    return [*shapes, ("lm_head.weight", (64, hidden))]


def config(hidden: int, intermediate: int, kv_heads: int = 2, layers: int = 3) -> dict[str, Any]:
    return {
        "architectures": ["OlmoForCausalLM"],
        "model_type": "olmo",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "vocab_size": 64,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


@pytest.fixture
def narrow(save: Save) -> Path:
    """192 columns: one and a half groups of 128, three of 64."""
    return save(weights(*olmo(192, 384)), config(192, 384))


def experts_of(hidden: int, intermediate: int, count: int = 3) -> Shapes:
    shapes: Shapes = []
    for index in range(2):
        layer = f"model.layers.{index}"
        shapes += [
            (f"{layer}.self_attn.{side}_proj.weight", (128, hidden)) for side in ("q", "k", "v")
        ]
        shapes += [(f"{layer}.self_attn.o_proj.weight", (hidden, 128))]
        shapes += [(f"{layer}.block_sparse_moe.gate.weight", (count, hidden))]
        for expert in range(count):
            at = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes += [(f"{at}.w1.weight", (intermediate, hidden))]
            shapes += [(f"{at}.w2.weight", (hidden, intermediate))]
            shapes += [(f"{at}.w3.weight", (intermediate, hidden))]
    return shapes


def mixtral(hidden: int, intermediate: int) -> dict[str, Any]:
    """The config for `experts_of`."""
    made = config(hidden, intermediate, kv_heads=4, layers=2)
    named = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    return made | named | {"num_local_experts": 3}


@pytest.fixture
def narrow_experts(save: Save) -> Path:
    """Experts of 96 in a model of 256."""
    return save(weights(*experts_of(256, 96)), mixtral(256, 96))


def quantized(plan: Plan) -> set[str]:
    return {part.linear.name for unit in plan.units for part in unit.parts}


def test_what_a_group_does_not_divide_is_left_named_and_told(narrow: Path) -> None:
    plan = plan_of(narrow, "w4a16")
    left = [(f"model.layers.{i}.{n}") for i in range(3) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "mlp.gate_proj", "mlp.up_proj",
    )]  # fmt: skip
    assert quantized(plan) == {
        f"model.layers.{i}.{n}" for i in range(3) for n in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert set(plan.ignore) == {*left, "lm_head"}
    (line,) = plan.told
    assert line == (
        "left unquantized: 3 x mlp.gate_proj [384, 192], 3 x mlp.up_proj [384, 192], 3 x "
        "self_attn.k_proj [64, 192], 3 x self_attn.q_proj [128, 192], 3 x self_attn.v_proj "
        "[64, 192]: groups of 128 do not divide 192 columns; `--group-size 64` would fit"
    )
    found = {unit.key: unit.rule for unit in plan.units}
    assert found[f"{left[0]}.weight"] == "groups of 128 do not divide 192 columns"
    assert found["lm_head.weight"] == "output head"


def test_the_way_out_is_one(narrow: Path) -> None:
    plan = plan_of(narrow, with_group_size(load_scheme("w4a16"), 64))
    assert len(quantized(plan)) == 3 * 7
    assert not plan.told
    assert plan.ignore == ("lm_head",)


def test_nothing_is_left_where_all_fits(llama: Path) -> None:
    assert not plan_of(llama, "w4a16").told


def test_all_experts_of_a_layer_stay_together(narrow_experts: Path) -> None:
    """vLLM has one scheme for them: w1 and w3 would fit."""
    plan = plan_of(narrow_experts, "w4a16")
    assert not [name for name in quantized(plan) if ".experts." in name]
    assert len(quantized(plan)) == 2 * 4
    (line,) = plan.told
    assert line.startswith(
        "left unquantized: 6 x block_sparse_moe.experts.*.w2 [256, 96], and with them "
        "6 x block_sparse_moe.experts.*.w1 [96, 256], 6 x block_sparse_moe.experts.*.w3 [96, 256]: "
        "groups of 128 do not divide 96 columns; `--group-size 32`"
    )
    for layer in range(2):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        assert f"re:{re.escape(experts)}\\..*" in plan.ignore
        assert {f"{experts}.0.{name}" for name in ("w1", "w2", "w3")} <= {*plan.ignore}


@pytest.mark.parametrize("index", [0, 1])
def test_one_odd_layer_leaves_the_others(save: Save, index: int) -> None:
    shapes = dict(experts_of(256, 128))
    for name in list(shapes):
        if f"layers.{index}." in name and name.endswith("experts.1.w2.weight"):
            shapes[name] = (256, 160)
    plan = plan_of(save(weights(*shapes.items()), mixtral(256, 128)), "w4a16")
    experts = {name.split(".")[2] for name in quantized(plan) if ".experts." in name}
    assert experts == {str(1 - index)}


@pytest.mark.parametrize(
    ("scheme", "hidden", "why"),
    [
        ("nvfp4a16", 200, "groups of 16 do not divide 200 columns"),
        ("mxfp4", 208, "groups of 32 do not divide 208 columns"),
        ("mxfp8a16", 208, "groups of 32 do not divide 208 columns"),
        ("fp8-block", 192, "activations in groups of 128 do not divide 192 columns"),
        ("w4a16-channel", 196, "196 columns do not fill whole words of 8 codes"),
        ("W4AFP8", 192, "groups of 128 do not divide 192 columns"),
    ],
)
def test_formats_with_sizes_of_their_own(save: Save, scheme: str, hidden: int, why: str) -> None:
    plan = plan_of(save(weights(*olmo(hidden, 384)), config(hidden, 384)), scheme)
    told = [line for line in plan.told if why in line]
    assert len(told) == 1
    assert told[0].endswith("`--scheme fp8-dynamic` supports any width")
    assert "model.layers.1.mlp.down_proj" in quantized(plan)
    assert "model.layers.1.mlp.up_proj" in plan.ignore


def test_zero_points_need_whole_words_of_rows(save: Save) -> None:
    """vLLM packs them along the rows, in the merged q/k/v too; the symmetric format has none."""
    folder = save(weights(*olmo(128, 256, kv_rows=60)), config(128, 256))
    plan = plan_of(folder, "w4a16-asym")
    assert not [name for name in quantized(plan) if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert "zero points of 60 rows do not fill whole words of 8" in plan.told[0]
    assert len(quantized(plan_of(folder, "w4a16"))) == 3 * 7


def test_blocks_of_rows_must_be_whole_where_they_are_merged(save: Save) -> None:
    """The last of a merged set may end in half a block, as may what is not merged at all."""
    shapes = {**dict(olmo(128, 192)), "model.layers.0.self_attn.o_proj.weight": (130, 128)}
    folder = save(weights(*shapes.items()), config(128, 192))
    blocks = of_weights(BLOCKS)
    plan = plan_of(folder, blocks)
    assert "model.layers.0.self_attn.o_proj" in quantized(plan)
    assert "model.layers.0.mlp.down_proj" in quantized(plan)
    assert not [n for n in quantized(plan) if n.endswith(("q_proj", "v_proj", "up_proj"))]
    assert [
        line for line in plan.told if "192 rows are not a whole number of blocks of 128" in line
    ]
    assert len(quantized(plan_of(folder, blocks, permutable=False))) == 3 * 7


def test_both_of_an_expert_must_be_whole(save: Save) -> None:
    folder = save(weights(*experts_of(256, 192)), mixtral(256, 192))
    plan = plan_of(folder, of_weights(BLOCKS))
    assert not [name for name in quantized(plan) if ".experts." in name]


def test_a_recipe_that_fits_nothing_is_refused_with_the_way_out(save: Save) -> None:
    shapes = olmo(96, 96, layers=1)
    shapes = [(n, (96, 96) if n.endswith("_proj.weight") else s) for n, s in shapes]
    folder = save(weights(*shapes), config(96, 96, layers=1))
    with pytest.raises(PlanError) as refused:
        plan_of(folder, "w8a16")
    first, second = str(refused.value).splitlines()
    assert first == "recipe 'w8a16' fits none of the Linears of this model:"
    assert second.endswith("divide 96 columns; `--group-size 32` would fit")
    assert len(quantized(plan_of(folder, with_group_size(load_scheme("w8a16"), 32)))) == 7


def test_a_group_that_has_nothing_left_is_not_declared(narrow: Path) -> None:
    mixed = load_text(
        "mixed",
        """
quantization_stage:
  quantization_modifiers:
    QuantizationModifier:
      ignore: [lm_head]
      config_groups:
        mlp:
          targets: ['re:.*(gate|up)_proj$']
          weights: {num_bits: 4, strategy: group, group_size: 128}
        rest: {targets: [Linear], weights: {num_bits: 8, strategy: channel}}
""",
    )
    plan = plan_of(narrow, mixed)
    assert [group.name for group in plan.recipe.groups] == ["rest"]
    assert set(plan.groups) == {"rest"}


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-asym", "w8a16", "W4A8", "W3A16", "w4a16-g32"])
@pytest.mark.parametrize("size", SIZES)
def test_another_size_is_what_llm_compressor_reads(scheme: str, size: int) -> None:
    made = with_group_size(load_scheme(scheme), size)
    read = load_text(made.name, made.text)
    for ours, theirs in zip(made.groups, read.groups, strict=True):
        assert ours.targets == theirs.targets
        assert ours.format == theirs.format
        assert ours.weights is not None
        assert theirs.weights is not None
        assert theirs.weights.strategy == ("channel" if size == -1 else "group")
        assert ours.weights == theirs.weights
        assert bool(ours.input_activations) == bool(theirs.input_activations)
    assert set(made.ignore) == set(read.ignore)


@pytest.mark.parametrize(
    ("scheme", "size", "why"),
    [
        ("w4a16", 96, "expected 32, 64 or 128"),
        ("w4a16", 0, "expected 32, 64 or 128"),
        ("nvfp4a16", 32, "one per 16 columns, fixed by the format"),
        ("mxfp4", 64, "one per 32 columns, fixed by the format"),
        ("fp8-dynamic", 64, "one per channel"),
        ("fp8-block", 64, "one per block"),
        ("kv-fp8-per-head", 64, "for attention only"),
        ("W4AFP8", 64, "with which vLLM supports only groups of 128"),
    ],
)
def test_sizes_that_no_engine_serves_are_refused(scheme: str, size: int, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        with_group_size(load_scheme(scheme), size)


def test_what_is_handed_over_is_not_resized() -> None:
    pytest.importorskip("llmcompressor")
    text = (
        "quant_stage: {quant_modifiers: {AWQModifier: {}, QuantizationModifier: "
        "{targets: [Linear], ignore: [lm_head], scheme: W4A16}}}"
    )
    with pytest.raises(UsageError, match="runs in llm-compressor"):
        with_group_size(load_text("awq", text), 64)


@pytest.mark.parametrize("scheme", ["w4a16", "fp8-block", "nvfp4a16", "w4a16-g64"])
def test_what_is_written_is_right_and_evaluates(narrow: Path, tmp_path: Path, scheme: str) -> None:
    """The whole way, with what is told on it."""
    recipe = load_scheme(scheme.removesuffix("-g64"))
    if scheme.endswith("-g64"):
        recipe = with_group_size(recipe, 64)
    told: list[str] = []
    request = QuantizeRequest(model=narrow, recipe=recipe, out=tmp_path / "out")
    made = quantize(request, note=told.append)
    assert bool(told) == (scheme in ("w4a16", "fp8-block"))
    report = verify(made.out, narrow)
    assert report.ok, report.findings
    declared = json.loads((made.out / "config.json").read_text())["quantization_config"]
    assert ("model.layers.2.mlp.up_proj" in declared["ignore"]) == bool(told)
    assert made.serve is not None


@pytest.mark.parametrize(("size", "served"), [(16, False), (64, True)])
def test_groups_for_which_vllm_has_no_kernel_are_told_before_and_after(
    narrow: Path, tmp_path: Path, size: int, served: bool
) -> None:
    weights = f"num_bits: 4, type: int, strategy: group, group_size: {size}"
    request = QuantizeRequest(model=narrow, recipe=of_weights(weights), out=tmp_path / "out")
    told: list[str] = []
    made = quantize(request, note=told.append)
    found = verify(made.out, narrow, engine="vllm").counts
    reason = f"vLLM has no kernel for groups of {size}; it has kernels for 32, 64, 128, 256"
    assert [reason in line for line in told] == [True] * (not served)
    assert found == ({} if served else {"engine-refuses": 3 * 7})
    assert (made.serve is not None) == served


def of_weights(weights: str) -> Recipe:
    """For recipes without activations, whose groups are stricter."""
    text = (
        "quant_stage: {quant_modifiers: {QuantizationModifier: {ignore: [lm_head], config_groups: "
        f"{{g: {{targets: [Linear], weights: {{{weights}}}}}}}}}}}}}"
    )
    return load_text("own", text)
