"""Recipes are read as llm-compressor reads them, and without it where it has nothing to run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import yaml

from ckptq.errors import UsageError
from ckptq.recipes.dialect import read_recipe
from ckptq.recipes.dialect.modifiers import RUN_HERE
from ckptq.recipes.load import load_recipe, load_scheme, load_text

W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}

SCHEMES: tuple[Any, ...] = (
    *("W4A16", "W4A16_ASYM", "W8A8", "FP8", "NVFP4", "MXFP4", "nope"),
    {"W8A8": ["Linear"], "FP8": "re:x"},
    {"nope": ["Linear"]},
)
BESIDE: tuple[dict[str, Any], ...] = (
    *({}, {"targets": "Linear"}, {"targets": ["re:.*q"]}, {"ignore": ["lm_head"]}),
    *({"weight_observer": "mse"}, {"observer": {"weights": "mse", "input": "mse"}}),
    *({"observer": {"weights": "mse"}, "input_observer": "x"}, {"observer": {"bad": "x"}}),
    *({"observer": "mse"}, {"kv_cache_scheme": FP8}, {"ignroe": ["lm_head"]}),
    {"config_groups": {"g": {"targets": ["Linear"], "weights": W4}}},
    *({"actorder": order} for order in ("static", "weight", "group", None)),
    *({"group": "a"}, {"block_size": 64, "dampening_frac": 0.1}),
    *({"batched_quantization": each} for each in (0, 4, "x")),
    *({"iters": 50, "lr": 0.01}, {"iters": "x"}, {"enable_torch_compile": False}),
)
GROUPS: tuple[dict[str, Any], ...] = (
    *({}, {"weights": W4}, {"weights": {**W4, "num_bits": "four"}}),
    *({"weights": {**W4, "actorder": order}} for order in ("weight", "group")),
    *({"weights": {**W4, "observer": observer}} for observer in ("mse", None)),
    {"weights": {**W4, "strategy": "tensor", "group_size": None}},
    *({"input_activations": TOKEN}, {"output_activations": FP8}),
)
OVER: tuple[dict[str, Any], ...] = (
    *({}, {"targets": ["re:x"]}, {"weight_observer": "mse"}, {"output_observer": "mse"}),
    *({"actorder": order} for order in ("static", "group", None)),
)


def recipe(kind: str, fields: dict[str, Any]) -> str:
    return yaml.safe_dump({"a_stage": {"a_modifiers": {kind: fields}}})


def outcome(
    read: Callable[[str], Iterable[read_recipe.Modifier]], text: str, refusal: type[Exception]
) -> object:
    try:
        found = list(read(text))
    except refusal:
        return "refused"
    own = ("block_size", "dampening_frac", "iters", "lr", "enable_torch_compile")
    return [
        (each.kind, {key: each.fields.get(key) for key in own}, each.config.model_dump())
        for each in found
    ]


@pytest.mark.parametrize("kind", RUN_HERE)
def test_a_recipe_says_to_us_what_it_says_to_llm_compressor(kind: str) -> None:
    pytest.importorskip("llmcompressor")
    cases = [
        *({"scheme": scheme, **more} for scheme, more in product(SCHEMES, BESIDE)),
        *(
            {"config_groups": {"g": {"targets": ["Linear"], **group}}, **more}
            for group, more in product(GROUPS, OVER)
        ),
        *({}, {"config_groups": {}}, {"config_groups": None, "targets": "Conv2d"}),
    ]
    refused = 0
    for fields in cases:
        text = recipe(kind, fields)
        ours = outcome(read_recipe.read_modifiers, text, UsageError)
        assert ours == outcome(read_recipe._read_theirs, text, Exception), text
        refused += ours == "refused"
    assert len(cases) // 5 < refused < len(cases) * 4 // 5


def test_a_recipe_needs_no_llm_compressor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    for name in ("W4A16", "nvfp4-search", "w4a16-gptq"):
        made = load_scheme(name)
        assert load_text(made.name, made.text).groups == made.groups


def test_what_needs_llm_compressor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    text = recipe("SmoothQuantModifier", {"smoothing_strength": 0.8})
    if importlib.util.find_spec("llmcompressor"):
        assert load_text("smooth", text).handed_over == ("SmoothQuantModifier",)
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(UsageError, match=r"SmoothQuantModifier.*pip install 'ckptq\[llmcompr"):
        load_text("smooth", text)


def test_a_modifier_that_is_no_mapping_is_named() -> None:
    text = yaml.safe_dump({"a_stage": {"a_modifiers": {"GPTQModifier": "W4A16"}}})
    with pytest.raises(UsageError, match=r"a_stage\.a_modifiers\.GPTQModifier is 'W4A16'"):
        load_text("bad", text)


PLAIN = "{targets: [Linear], scheme: FP8_DYNAMIC}"


@pytest.mark.parametrize(
    ("stage", "group", "kind", "words"),
    [
        ("quantization", "quantization_modifiers", "QuantizationModifier",
         "QuantizationModifier in 'quantization' would not run: names of stages end in _stage"),
        ("quantization_stage", "modifiers", "GPTQModifier",
         "GPTQModifier in 'modifiers' would not run: names of groups end in _modifiers"),
        ("quantization_stage", "quantization_modifiers", "QuantisationModifier",
         "unknown modifier 'QuantisationModifier'; known are .*, QuantizationModifier, "),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_its_file_and_the_known_ones(
    tmp_path, stage, group, kind, words
):
    if kind == "QuantisationModifier":  # whose other modifiers llm-compressor knows
        pytest.importorskip("llmcompressor")
    file = tmp_path / "mine.yaml"
    good = f"other_stage: {{quantization_modifiers: {{QuantizationModifier: {PLAIN}}}}}\n"
    file.write_text(good + f"{stage}: {{{group}: {{{kind}: {PLAIN}}}}}\n")
    with pytest.raises(UsageError, match=f"mine.yaml: {words}"):
        load_recipe(file)
    file.write_text(good + "notes: {quantization: {by: hand}}\n")  # passed over, as by its maker
    assert load_recipe(file).groups
