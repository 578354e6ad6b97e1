"""Built-in recipes are llm-compressor's own dialect, and mean to it what they mean to us."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ckptq.errors import UsageError
from ckptq.recipes.load import built_in, load_recipe, load_scheme, load_text

PRESETS = {
    "fp8-dynamic": "FP8_DYNAMIC",
    "fp8-static": "FP8",
    "fp8-block": "FP8_BLOCK",
    "w8a8": "W8A8",
    "w8a16": "W8A16",
    "w4a16": "W4A16",
    "w4a16-asym": "W4A16_ASYM",
    "nvfp4": "NVFP4",
    "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4",
    "mxfp4a16": "MXFP4A16",
    "mxfp8": "MXFP8",
    "mxfp8a16": "MXFP8A16",
}


@pytest.mark.parametrize("name", built_in())
def test_llm_compressor_reads_each_built_in_recipe_as_we_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llmcompressor")
    monkeypatch.setattr("ckptq.recipes.dialect.modifiers.RUN_HERE", {})  # its own classes read
    ours = load_scheme(name)
    theirs = load_text(name, ours.text)
    assert ours == theirs


@pytest.mark.parametrize(("name", "preset"), PRESETS.items())
def test_a_built_in_recipe_equals_the_preset_of_compressed_tensors(name: str, preset: str) -> None:
    text = f"""
quantization_stage:
  quantization_modifiers:
    QuantizationModifier: {{targets: [Linear], scheme: {preset}, ignore: [lm_head]}}
"""
    (ours,), (theirs,) = load_scheme(name).groups, load_text(preset, text).groups
    assert ours.weights is not None
    assert theirs.weights is not None
    if theirs.weights.zp_dtype is None:  # since 0.20 a preset leaves it to the format
        said = replace(theirs.weights, zp_dtype=ours.weights.zp_dtype)
        theirs = replace(theirs, weights=said)
    assert ours == replace(theirs, name=ours.name)


def test_preset_names_are_schemes() -> None:
    recipe = load_scheme("INT8")
    assert recipe.groups[0].format == "int-quantized"
    assert recipe.ignore == ("lm_head",)


@pytest.mark.parametrize("name", built_in())
def test_every_built_in_weight_scheme_is_one_that_we_quantize(name: str) -> None:
    for group in load_scheme(name).groups:
        if group.weights is not None:
            group.weight_scheme()


def test_an_unknown_scheme_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"(?s)unknown scheme 'fp9'.*fp8-per-head"):
        load_scheme("fp9")


def test_a_typo_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(load_scheme("fp8-dynamic").text.replace("ignore:", "ignroe:"))
    with pytest.raises(UsageError, match=r"(?s)recipe\.yaml.*ignroe"):
        load_recipe(file)


@pytest.mark.parametrize("where", ["ignore", "targets"])
def test_a_pattern_that_is_none_is_named(tmp_path: Path, where: str) -> None:
    file = tmp_path / "recipe.yaml"
    fields = {"ignore": ["lm_head"], "targets": ["Linear"]}
    modifier = {"scheme": "W8A8", **fields, where: [*fields[where], "re:.*(q_proj"]}
    stage = {"a_modifiers": {"QuantizationModifier": modifier}}
    file.write_text(yaml.safe_dump({"a_stage": stage}))
    with pytest.raises(UsageError, match=r"recipe\.yaml: .*'re:\.\*\(q_proj': not a regular expr"):
        load_recipe(file)


def test_a_users_recipe_loads_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "default_stage:\n  default_modifiers:\n    QuantizationModifier:\n"
        "      targets: [Linear]\n      scheme: W4A16\n      ignore: ['re:.*router']\n"
        "      kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true,"
        " dynamic: false}\n"
    )
    recipe = load_recipe(file)
    assert recipe.name == "mine"
    assert recipe.groups[0].format == "pack-quantized"
    assert recipe.ignore == ("re:.*router",)
    assert recipe.attention is not None
    assert recipe.attention.strategy == "tensor"


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "quantization_stage: {}\n", "a: [1,"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds nothing; expected a mapping of stages to modifiers"),
        ("- a\n- b\n", "holds a list; expected a mapping"),
        ("fp8", "holds a str; expected a mapping"),
        ("a:\n  b: [1,\n", "not valid YAML: .*line 3"),
    ],
)
def test_what_is_no_mapping_is_said_in_our_words(text: str, words: str) -> None:
    """llm-compressor takes it for the name of a file, and prints the whole text."""
    with pytest.raises(UsageError, match=f"(?s)^{words}") as found:
        load_text("bad", text)
    assert "path exists" not in str(found.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_bits", "four", "Input should be a valid integer, .*, found 'four'"),
        ("num_bits", 4.5, "Input should be a valid integer, .*, found 4.5"),
        ("strategy", "groop", "'groop' is not a valid QuantizationStrategy, found 'groop'"),
        ("symmetrc", True, "Extra inputs are not permitted, found True"),
        ("group_size", "128", "weights.group_size is '128': '<' not supported"),
    ],
)
def test_a_wrong_type_is_named_with_its_place(field: str, value: object, words: str) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, field: value}
    groups = {"mlp": {"targets": ["re:.*mlp.*"], "weights": weights}}
    modifier = {"QuantizationModifier": {"config_groups": groups}}
    text = yaml.safe_dump({"a_stage": {"a_modifiers": modifier}})
    with pytest.raises(UsageError, match=rf"config_groups\.mlp\.weights\.{field}") as found:
        load_text("bad", text)
    assert re.search(words, str(found.value))
    assert len(str(found.value).splitlines()) == 1
