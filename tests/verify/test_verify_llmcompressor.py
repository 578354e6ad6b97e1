"""Checkpoints that llm-compressor has made: no fault, but for its broken q_scale."""

import pytest
import torch
import transformers
from tiny.formats import FP8, INT4
from tiny.oneshot import calibration
from verify_checkpoints import Editor, copy_of

from ckptq.verify.diagnosis.rescaled import factors, near_one
from ckptq.verify.run import verify


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nothing was written to shows: what `torch.empty` gives is NaN."""
    empty = torch.empty

    def poison(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poison)


def oneshot(source, out, groups, data=None):
    pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    return run(source, out, recipe, data or {})


def run(source, out, recipe, data):
    pytest.importorskip("llmcompressor")
    from llmcompressor import oneshot as llmcompressor_oneshot

    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype="auto")
    llmcompressor_oneshot(model=model, recipe=recipe, **data)
    model.save_pretrained(out, save_compressed=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    return out


def linears(args, inputs=None):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    activations = QuantizationArgs(**inputs) if inputs else None
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**args), input_activations=activations
    )


TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("args", "inputs"),
    [
        (FP8 | {"strategy": "channel"}, TOKEN),
        (FP8 | {"strategy": "tensor"}, None),
        (INT4 | {"strategy": "group", "group_size": 32}, None),
        (INT4 | {"strategy": "group", "group_size": 32, "symmetric": False}, None),
    ],
    ids=["fp8-channel", "fp8-tensor", "int4", "int4-asym"],
)
def test_its_checkpoints_have_no_fault(sources, tmp_path, args, inputs):
    source = sources("llama")
    out = oneshot(source, tmp_path / "out", {"group_0": linears(args, inputs)})
    report = verify(out, source)
    assert report.findings == ()
    assert report.checks["linears compared"] == report.checks["linears quantized"] == 14
    about = codes_of(report)
    assert about <= {"rounded-twice", "side-file-differs", "fused-scales-differ"}
    assert ("fused-scales-differ" in about) == (args["strategy"] == "tensor")
    assert sum(t.codes_rounded_twice for t in report.tensors) > 0
    assert all(t.codes_wrong == t.codes_rounded_twice for t in report.tensors)


@pytest.fixture
def data():
    """Token ids to calibrate on."""
    return calibration(
        torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    )


def codes_of(report):
    return {note.code for note in report.notes if note.file != "config.json"}


def test_codes_that_gptq_chose(sources, tmp_path, data):
    pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.quantization import GPTQModifier

    source = sources("llama")
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    report = verify(run(source, tmp_path / "out", recipe, data), source)
    assert report.findings == ()
    assert "codes-not-nearest" in codes_of(report) <= {"codes-not-nearest", "side-file-differs"}


def test_scales_of_a_search_are_proved_and_those_of_another_observer_noted(sources, tmp_path, data):
    source = sources("llama")
    mse = INT4 | {"strategy": "group", "group_size": 32, "observer": "mse"}
    out = oneshot(source, tmp_path / "out", {"group_0": linears(mse)}, data)
    report = verify(out, source)
    assert report.findings == ()
    assert codes_of(report) <= {"rounded-twice", "side-file-differs"}
    config = (out / "config.json").read_text()
    assert config.count('"mse"') == 1
    (out / "config.json").write_text(config.replace('"mse"', '"memoryless_minmax"'))
    report = verify(out, source)
    assert report.findings == ()
    assert {"scale-differs"} <= codes_of(report) <= {"scale-differs", "side-file-differs"}


@pytest.mark.parametrize(
    ("strength", "spread", "scheme", "gptq"),
    [(0.8, 0, "W8A8", False), (0.9, 2, "W8A8", True)],
)
def test_columns_that_smoothquant_rescaled(sources, tmp_path, data, strength, spread, scheme, gptq):
    """Right, because the norms before them undo it; the twin puts the source's norms back. Where
    these differ much, a few columns take most of the range, and others vanish."""
    pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    original = copy_of(sources("llama"), tmp_path / "source")
    generator = torch.Generator().manual_seed(0)
    for name in (n for n in original.tensors if n.endswith("layernorm.weight")):
        factor = torch.exp(spread * torch.randn(original.tensors[name].shape, generator=generator))
        original.tensors[name] = (original.tensors[name] * factor).bfloat16()
    source = original.save()
    kind = GPTQModifier if gptq else QuantizationModifier
    before = SmoothQuantModifier(smoothing_strength=strength)
    rounded = kind(targets="Linear", scheme=scheme, ignore=["lm_head"])
    out = run(source, tmp_path / "out", [before, rounded], data)
    report = verify(out, source)
    assert report.findings == ()
    assert "columns-rescaled" in codes_of(report)
    assert any(n.tensor.endswith("layernorm.weight") for n in report.notes if n.tensor)
    editor = Editor(out)
    for name, tensor in original.tensors.items():
        if name.endswith("layernorm.weight"):
            editor.tensors[name] = tensor
    assert verify(editor.save(), source).counts == {"columns-unbalanced": 10}


@pytest.mark.parametrize(("off", "cancel"), [(1.0, True), (1.1, False)])
def test_factors_cancel_as_far_as_codes_tell_them(off, cancel):
    """64 codes, most of them 0 or 1, tell the factor of their column within 4 %."""
    wanted = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    factor_K, error_K = factors((wanted * off).round(), wanted)
    assert not near_one(factor_K, torch.zeros(8)), "without errors these would be too far off"
    assert near_one(factor_K, error_K) == cancel


def test_its_uninitialised_query_scales_are_found(sources, tmp_path, poisoned, data):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, type="float", strategy="attn_head")
    groups = {
        "attention": QuantizationScheme(targets=["LlamaAttention"], input_activations=args),
        "linear": linears(FP8 | {"strategy": "channel"}, TOKEN),
    }
    source = sources("llama")
    report = verify(oneshot(source, tmp_path / "out", groups, data), source)
    assert {(f.code, f.tensor) for f in report.findings} == {
        ("scale-not-finite", f"model.layers.{layer}.self_attn.q_scale") for layer in (0, 1)
    }
