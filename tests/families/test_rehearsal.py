"""What calibration would refuse is refused by the plan and by `--dry-run`; no weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ckptq.cli import app
from ckptq.convert.quantize import QuantizeRequest, plan_of
from ckptq.errors import PlanError, SourceError
from ckptq.models.refusals import WEIGHTS_ALONE
from ckptq.recipes.load import load_scheme
from families.sources import save


def plan(source: Path, scheme: str = "fp8-per-head", scales: Path | None = None) -> None:
    plan_of(QuantizeRequest(model=source, recipe=load_scheme(scheme), scales=scales))


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gptj", "attention classes of its own"),
        ("falcon", "attention classes of its own"),
        ("bloom", "did not run as attention of transformers' interface"),
        ("mpt", "did not run as attention of transformers' interface"),
        ("mllama", "called 3 of its 4 decoder layers"),
        ("blip2", "missing 1 required positional argument: 'pixel_values'"),
        ("exaone", "calibration needs transformers"),
    ],
)
def test_what_calibration_would_refuse_is_refused_by_the_plan(
    tmp_path: Path, family: str, said: str
) -> None:
    source = save(family, tmp_path)
    with pytest.raises((PlanError, SourceError)) as refused:
        plan(source)
    assert said in str(refused.value)
    assert WEIGHTS_ALONE in str(refused.value)
    plan(source, "fp8-dynamic")


def test_heads_that_cannot_be_told_apart_are_scaled_per_tensor(tmp_path: Path) -> None:
    """JetMoE, whose attention asks a router first."""
    source = save("jetmoe", tmp_path)
    with pytest.raises(PlanError, match=r"passes 8 heads to attention, but .* is for 4"):
        plan(source)
    plan(source, "fp8-per-tensor")


@pytest.mark.parametrize("family", ["llama", "qwen3_5_moe", "gemma4_e", "zamba2", "paligemma"])
def test_what_calibration_does_is_no_matter(tmp_path: Path, family: str) -> None:
    plan(save(family, tmp_path))


def test_code_of_the_checkpoints_own_is_the_way_out(tmp_path: Path) -> None:
    source = save("internlm2", tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="or pass --trust-remote-code"):
        plan(source)


def test_static_inputs_are_rehearsed_too(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="called 3 of its 4 decoder layers"):
        plan(save("mllama", tmp_path), "fp8-static")
    plan(save("qwen2", tmp_path), "fp8-static")


def test_no_weight_is_read(tmp_path: Path) -> None:
    """The tensors' bytes could be anything."""
    source = save("mistral", tmp_path)
    file = source / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    plan(source)


def test_given_scales_need_no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr("ckptq.convert.quantize.rehearse", lambda *a: called.append(a))
    source = save("llama", tmp_path)
    plan(source, scales=tmp_path / "scales.safetensors")
    assert not called
    plan(source)
    assert called


def test_a_dry_run_refuses_it(tmp_path: Path) -> None:
    source = str(save("bloom", tmp_path))
    done = CliRunner().invoke(app, ["quantize", source, "-s", "fp8-per-head", "--dry-run"])
    assert isinstance(done.exception, PlanError)


@pytest.mark.parametrize(
    ("family", "scheme", "said"),
    [
        ("hrm_text", "fp8-dynamic", "HrmTextForCausalLM has no single list of 4 decoder layers"),
        ("longcat_flash", "fp8-per-head", "caches one latent for all heads"),
        (
            "mamba",
            "fp8-dynamic",
            "such as backbone.layers.0.mixer.dt_proj (vLLM never quantizes it)",
        ),
        ("falcon_mamba", "fp8-per-head", "this model has no attention heads"),
        ("gpt2", "fp8-per-head", "layers as [in, out] (Conv1D)"),
    ],
)
def test_a_refusal_says_the_true_reason(
    tmp_path: Path, family: str, scheme: str, said: str
) -> None:
    with pytest.raises(PlanError) as refused:
        plan(save(family, tmp_path), scheme)
    assert said in str(refused.value)
