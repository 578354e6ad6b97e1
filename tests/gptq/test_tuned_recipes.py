"""Schemes and recipes that name AutoRound: read, composed with other choices, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from gptq_cases import converted, save
from tiny.tensors import tensors_in
from tuned_cases import in_steps

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, plan_of
from ckptq.errors import PlanError, UsageError
from ckptq.evaluate.request import EvaluationRequest, evaluate_request
from ckptq.forward.layerwise import Stream
from ckptq.recipes.group_size import with_group_size
from ckptq.recipes.load import load_scheme, load_text, load_written
from ckptq.recipes.scheme import Tuning

RECIPE = """
quant_stage:
  quant_modifiers:
    AutoRoundModifier: {targets: [Linear], ignore: [lm_head], %s}
"""


@pytest.mark.parametrize("name", ["w4a16-tuned", "w4a16-asym-tuned", "mxfp4a16-tuned"])
def test_a_scheme_is_a_recipe_of_llm_compressors(tmp_path: Path, name: str) -> None:
    recipe = load_scheme(name)
    assert recipe.name == name
    assert recipe.tuning == Tuning(iters=200, enable_torch_compile=False)
    assert recipe.runs_layers
    assert recipe.chooses
    again = load_text(name, recipe.text)
    assert (again.groups, again.tuning, again.ignore) == (
        recipe.groups,
        recipe.tuning,
        recipe.ignore,
    )
    (tmp_path / "recipe.yaml").write_text(recipe.text)
    assert load_written(tmp_path / "recipe.yaml").tuning == recipe.tuning


def test_a_recipe_has_the_modifiers_own_defaults() -> None:
    pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.autoround import AutoRoundModifier

    tuning = load_text("own", RECIPE % "scheme: W4A16").tuning
    fields = AutoRoundModifier.model_fields
    assert tuning is not None
    assert tuning.to_dict() == {name: fields[name].default for name in tuning.to_dict()}
    assert with_group_size(load_scheme("w4a16-tuned"), 64).tuning == Tuning(
        enable_torch_compile=False
    )


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("scheme: W4A16, iters: 0", "AutoRoundModifier.iters is 0; expected 1 or more"),
        ("scheme: W4A16, batch_size: 0", "batch_size is 0"),
        ("scheme: W4A16, lr: -0.1", "lr is -0.1; expected more than 0"),
        ("scheme: W4A16, device_ids: '0,1'", "device_ids is '0,1'; one layer is in memory"),
        ("scheme: W4A16, itters: 3", "itters"),
        ("scheme: FP8_DYNAMIC", "is float-quantized; AutoRound tunes pack-quantized"),
        ("scheme: W4A16, weight_observer: mse", "observer 'mse'; AutoRound tunes ranges itself"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(said: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_text("own", RECIPE % said)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("w4a16-gptq-tuned", "has GPTQModifier already"),
        ("w4a16-tuned-refined", "has AutoRoundModifier already"),
        ("w4a16-tuned-tuned", "has AutoRoundModifier already"),
        ("w4a16-tuned-search", "AutoRound tunes ranges itself"),
        ("w4a16-imatrix-tuned", "AutoRound tunes ranges itself"),
        ("kv-fp8-per-head-tuned", "quantizes no weights"),
        ("fp8-block-tuned", "AutoRound tunes pack-quantized"),
    ],
)
def test_schemes_that_it_does_not_go_with_are_refused(scheme: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_scheme(scheme)


def test_what_cannot_be_tuned_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = save(tmp_path / "llama", num_hidden_layers=1)
    recipe = in_steps("w4a16-g32-tuned", 1)
    assert len(plan_of(QuantizeRequest(model=llama, recipe=recipe)).quantized) == 7
    batches = CalibrationRequest(batch_size=2)
    with pytest.raises(UsageError, match="makes batches of its own"):
        plan_of(QuantizeRequest(model=llama, recipe=recipe, calibration=batches))
    with pytest.raises(UsageError, match="run `ckptq quantize`, then evaluate its result"):
        evaluate_request(llama, EvaluationRequest(schemes=(recipe.name,)))
    monkeypatch.setattr(Stream, "resumable", False)  # as with Gemma-3n's shared keys and values
    with pytest.raises(PlanError, match="AutoRound cannot run one many times"):
        plan_of(QuantizeRequest(model=llama, recipe=recipe))


def test_layers_that_are_ignored_pass_tuned_samples_on(tmp_path: Path) -> None:
    llama = save(tmp_path / "llama")
    text = in_steps("w4a16-g32-tuned", 1).text.replace("- lm_head", "- lm_head\n      - re:.*s.0.*")
    out = converted(llama, tmp_path / "out", load_text("own", text))
    packed = [name for name in tensors_in(out) if name.endswith("weight_packed")]
    assert len(packed) == 7
