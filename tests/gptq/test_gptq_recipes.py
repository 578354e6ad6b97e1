"""Schemes and recipes that name GPTQ: read, composed with other choices, or refused with a line."""

from __future__ import annotations

from pathlib import Path

import pytest
from gptq_cases import converted, save

from ckptq.calibrate.request import CalibrationRequest
from ckptq.calibrate.to_file import ScalesRequest, calibrate_to_file
from ckptq.convert.quantize import QuantizeRequest, plan_of, quantize
from ckptq.errors import SourceError, UsageError
from ckptq.evaluate.request import EvaluationRequest, evaluate_request
from ckptq.recipes.gptq import with_gptq
from ckptq.recipes.group_size import with_group_size
from ckptq.recipes.load import load_scheme, load_text, load_written
from ckptq.recipes.scheme import Gptq

RECIPE = """
quant_stage:
  quant_modifiers:
    %s: {targets: [Linear], ignore: [lm_head], %s}
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("recipes"), num_hidden_layers=1)


@pytest.mark.parametrize(
    "name",
    ["w4a16-gptq", "w4a16-g32-search-gptq", "w8a8-gptq", "nvfp4-gptq", "fp8-per-head-gptq"],
)
def test_a_scheme_is_a_recipe_of_llm_compressors(tmp_path: Path, name: str) -> None:
    recipe = load_scheme(name)
    assert recipe.name == name
    assert recipe.gptq == Gptq(block_size=128, dampening_frac=0.01)
    again = load_text(name, recipe.text)
    assert (again.groups, again.gptq, again.ignore) == (recipe.groups, recipe.gptq, recipe.ignore)
    assert again.kv_cache_scheme == recipe.kv_cache_scheme
    (tmp_path / "recipe.yaml").write_text(recipe.text)
    assert load_written(tmp_path / "recipe.yaml").groups == recipe.groups
    assert all(g.weights.actorder == "static" for g in recipe.linears if g.weights)


def test_other_choices_keep_it() -> None:
    assert with_group_size(load_scheme("w4a16-gptq"), 64).gptq is not None
    assert load_scheme("w4a16-gptq-search").groups == load_scheme("w4a16-search-gptq").groups
    resized = with_group_size(load_scheme("w4a16-gptq"), 64)
    assert load_text("own", resized.text).gptq == resized.gptq


@pytest.mark.parametrize("name", ["w4a16-refined", "nvfp4-refined", "w8a8-gptq-refined"])
def test_a_refined_scheme_says_what_llm_compressor_does_not_have(tmp_path: Path, name: str) -> None:
    recipe = load_scheme(name)
    assert recipe.name == name
    assert recipe.gptq == Gptq(descents=4)
    weighed = [g.weights.weighed for g in recipe.linears if g.weights]
    assert weighed == [name != "w8a8-gptq-refined"]
    assert load_text(name, recipe.text) == recipe
    (tmp_path / "recipe.yaml").write_text(recipe.text)
    assert load_written(tmp_path / "recipe.yaml").gptq == recipe.gptq
    assert with_group_size(load_scheme("w4a16-refined"), 64).gptq == Gptq(descents=4)
    assert "descents" not in load_scheme("w4a16-gptq").text


def test_a_refined_scheme_keeps_the_ranges_that_it_is_made_of() -> None:
    searched, refined = load_scheme("w4a16-search-gptq"), load_scheme("w4a16-search-refined")
    assert refined.groups == searched.groups
    with pytest.raises(UsageError, match=r"'fp8-block-refined'.*strategy 'block'"):
        load_scheme("fp8-block-refined")
    with pytest.raises(UsageError, match="has descents already"):
        load_scheme("w4a16-refined-refined")


def test_an_order_is_said_where_there_is_none() -> None:
    recipe = load_text("own", RECIPE % ("GPTQModifier", "scheme: W4A16, actorder: null"))
    resized = with_group_size(recipe, 64)
    assert [g.weights.actorder for g in load_text("own", resized.text).linears] == [None]


@pytest.mark.parametrize(
    ("modifier", "said", "words"),
    [
        ("GPTQModifier", "scheme: W4A16, dampening_frac: null", "dampening_frac is None"),
        ("GPTQModifier", "scheme: W4A16, dampening_frac: -1", "dampening_frac is -1.0"),
        ("GPTQModifier", "scheme: W4A16, block_size: 0", "block_size is 0"),
        ("GPTQModifier", "scheme: W4A16, descents: -1", "descents is -1; expected a number up to"),
        ("GPTQModifier", "scheme: W4A16, descents: true", "descents is True"),
        ("GPTQModifier", "scheme: FP8, descents: 2", "has strategy 'tensor'; descents fit scales"),
        ("AWQModifier", "scheme: W4A16, descents: 2", "descents"),
        ("GPTQModifier", "scheme: W4A16, actorder: group", "actorder"),
        ("GPTQModifier", "scheme: MXFP4A16", "is mxfp4-pack-quantized; GPTQ chooses codes of"),
        (
            "QuantizationModifier",
            "config_groups: {g: {targets: [Linear], weights: "
            "{num_bits: 4, strategy: group, group_size: 64, actorder: static}}}",
            "actorder is 'static', which GPTQModifier alone obeys",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(modifier: str, said: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_text("own", RECIPE % (modifier, said))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("w4a16-gptq-gptq", "has GPTQModifier already"),
        ("kv-fp8-per-head-gptq", "quantizes no weights"),
        ("mxfp4a16-gptq", "mxfp4-pack-quantized"),
    ],
)
def test_schemes_that_gptq_does_not_go_with_are_refused(scheme: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_scheme(scheme)


def test_gptq_cannot_be_added_to_what_is_handed_over() -> None:
    both = RECIPE % ("AWQModifier: {}\n    QuantizationModifier", "scheme: W4A16")
    awq = load_text("awq", both)
    with pytest.raises(UsageError, match="has AWQModifier already"):
        with_gptq(awq)


def test_the_plan_is_shown_without_running_anything(llama: Path) -> None:
    plan = plan_of(QuantizeRequest(model=llama, recipe=load_scheme("w4a16-g32-gptq")))
    assert len(plan.quantized) == 7


@pytest.mark.parametrize("scheme", ["w4a16-g32-gptq", "w4a16-g32-imatrix"])
def test_evaluate_does_not_pass_rounding_off_as_it(llama: Path, scheme: str) -> None:
    asked = EvaluationRequest(schemes=(scheme,))
    with pytest.raises(UsageError, match="run `ckptq quantize`, then evaluate its result"):
        evaluate_request(llama, asked)


def test_scales_from_a_file_do_not_go_with_it(llama: Path, tmp_path: Path) -> None:
    request = QuantizeRequest(
        model=llama, recipe=load_scheme("fp8-per-head-gptq"), scales=tmp_path / "s.safetensors"
    )
    with pytest.raises(UsageError, match="in the same pass; leave --scales out"):
        quantize(request)


def test_calibrate_leaves_it_to_quantize(llama: Path, tmp_path: Path) -> None:
    wanted = CalibrationRequest(samples=1, seq_len=8)
    recipe = load_scheme("fp8-per-head-gptq")
    request = ScalesRequest(model=llama, recipe=recipe, output=tmp_path / "s", text=wanted)
    with pytest.raises(UsageError, match="`ckptq quantize` calibrates its scales in the same pass"):
        calibrate_to_file(request)
    assert not (tmp_path / "s").exists()


def test_an_order_of_rows_that_layers_cannot_run_with_is_refused(tmp_path: Path) -> None:
    from tiny.models import llama4

    source = tmp_path / "llama4"
    text = {
        "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128,
        "intermediate_size_mlp": 128, "num_local_experts": 0, "moe_layers": [],
        "interleave_moe_layer_step": 0, "pad_token_id": 0,
    }  # fmt: skip
    llama4(text).save_pretrained(source)
    with pytest.raises(UsageError, match="run `ckptq permute` on its result"):
        converted(source, tmp_path / "out", "w4a16-g32-gptq", rope_order="half-split")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("scheme", ["w4a16-g32-refined", "fp8-per-head"])
def test_a_run_without_its_text_leaves_nothing(llama: Path, tmp_path: Path, scheme: str) -> None:
    request = QuantizeRequest(
        model=llama,
        recipe=load_scheme(scheme),
        out=tmp_path / "out",
        calibration=CalibrationRequest(data=str(tmp_path / "none.jsonl")),
    )
    with pytest.raises(SourceError, match=r"none\.jsonl: cannot be read"):
        quantize(request)
    assert list(tmp_path.iterdir()) == []
