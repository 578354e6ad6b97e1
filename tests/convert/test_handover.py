"""SmoothQuant and GPTQ in llm-compressor, their result through our writer; other modifiers refused
by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_killed import digests
from safetensors.torch import load_file
from tiny.words import word_tokenizer

from ckptq.calibrate.request import NO_DATA, CalibrationRequest
from ckptq.checkpoint import journal
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert import handover
from ckptq.convert.handover import check_handed_over, write_handed_over
from ckptq.convert.output import RunOptions
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import SourceError, UsageError
from ckptq.recipes.load import load_text
from ckptq.verify.run import verify

BOTH = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {mappings: [[["re:.*nowhere"], "re:.*nowhere"]]}
    GPTQModifier: {targets: [Linear], scheme: W4A16, ignore: [lm_head]}
"""

KV = "{num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=128,
        vocab_size=64,
        max_position_embeddings=64,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = [f"w{i}" for i in range(64)]
    word_tokenizer(words, "w0", pad_token="w0").save_pretrained(folder)
    text = "\n".join(" ".join(f"w{(i * j) % 64}" for j in range(32)) for i in range(1, 40))
    (tmp_path / "text.txt").write_text(text)
    return folder


def test_smoothquant_and_gptq_run_in_llm_compressor_and_is_written_by_us(
    llama: Path, tmp_path: Path
) -> None:
    generation = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9}'  # read, and never saved
    (llama / "generation_config.json").write_text(generation)
    wanted = CalibrationRequest(data=str(tmp_path / "text.txt"), samples=8, seq_len=32)
    recipe = load_text("both", BOTH)
    assert recipe.handed_over == ("SmoothQuantModifier", "GPTQModifier")
    out = tmp_path / "out"
    ckpt = open_checkpoint(llama)
    result = write_handed_over(ckpt, recipe, out, wanted, arguments=wanted.arguments())
    assert result.linears == 7
    assert verify(out, llama).ok
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert json.loads((out / "ckptq.json").read_text())["arguments"]["handed_over"]
    assert not (tmp_path / "out.partial").exists()
    codes = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert codes.dtype == torch.int32
    assert (out / "generation_config.json").read_text() == generation


@pytest.mark.parametrize("damage", ["cut", "gone", "none"])
@pytest.mark.parametrize("step", ["before the rename", "after the rename"])
def test_killed_after_oneshot_its_result_is_proved_or_made_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, step: str
) -> None:
    if step == "after the rename" and damage != "none":
        pytest.skip("then nothing is left of it")
    wanted = CalibrationRequest(data=str(tmp_path / "text.txt"), samples=2, seq_len=8)
    recipe, runs = load_text("both", BOTH), []
    oneshot = handover.run_oneshot
    monkeypatch.setattr(handover, "run_oneshot", lambda *a: (runs.append(a), oneshot(*a))[1])

    def write(out: Path) -> None:
        write_handed_over(open_checkpoint(llama), recipe, out, wanted, arguments={})

    write(tmp_path / "whole")
    name = "rename_new" if step == "before the rename" else "remove"
    with monkeypatch.context() as patched:
        patched.setattr(journal, name, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "out")
    made = tmp_path / "out.partial" / "oneshot" / "model.safetensors"
    if damage == "cut":
        made.write_bytes(made.read_bytes()[:-100] + bytes(100))
    elif damage == "gone":
        made.unlink()
    write(tmp_path / "out")
    assert len(runs) == (2 if damage == "none" else 3)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"architectures": ["New"]},
            r"config.json: architectures \['New'\] are not in transformers",
        ),
        (
            {"model_type": "new", "architectures": ["New"]},
            "config.json: transformers cannot read it",
        ),
        ({"intermediate_size": 64}, "llama: transformers cannot load the model"),
    ],
)
def test_a_model_that_transformers_cannot_load_is_named(
    llama: Path, tmp_path: Path, changed: dict, words: str
) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | changed))
    wanted = CalibrationRequest(data=str(tmp_path / "text.txt"), samples=2, seq_len=8)
    recipe = load_text("both", BOTH)
    with pytest.raises(SourceError, match=words):
        write_handed_over(open_checkpoint(llama), recipe, tmp_path / "out", wanted, arguments={})


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("ignore", {"ignore": ("re:.*up",)}),
        ("scales", {"scales": Path("s")}),
        ("as-written", {"as_written": True}),
        ("max-ram", {"options": RunOptions(max_ram=10**9)}),
        ("device", {"options": RunOptions(device="cpu")}),
        ("batch-size", {"calibration": CalibrationRequest(batch_size=4)}),
    ],
)
def test_options_that_would_not_be_heard_are_refused(llama: Path, option: str, given) -> None:
    request = QuantizeRequest(model=llama, recipe=load_text("both", BOTH), **given)
    with pytest.raises(UsageError, match=f"does not support --{option}"):
        quantize(request)


def test_the_built_in_corpus_is_said_for_llm_compressor_too(llama: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    wanted = CalibrationRequest(samples=2, seq_len=8)
    recipe = load_text("both", BOTH)
    out = tmp_path / "out"
    quantize(
        QuantizeRequest(model=llama, recipe=recipe, out=out, calibration=wanted),
        note=heard.append,
    )
    assert heard == [NO_DATA]


def test_modifiers_that_nobody_does_are_refused_by_name() -> None:
    pruning = """
prune_stage:
  prune_modifiers:
    SparseGPTModifier: {sparsity: 0.5, targets: [Linear]}
"""
    with pytest.raises(UsageError, match="SparseGPTModifier is not supported"):
        check_handed_over(load_text("prune", pruning))


def test_a_cache_scheme_beside_oneshot_is_refused_with_the_reason() -> None:
    both = BOTH.replace("ignore: [lm_head]}", f"ignore: [lm_head], kv_cache_scheme: {KV}}}")
    with pytest.raises(UsageError, match="q scales uninitialised"):
        check_handed_over(load_text("both", both))


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, {}),
        ({"do_sample": False, "top_k": 7}, {"temperature": 0.3, "num_beams": 4}),
    ],
)
def test_settings_that_transformers_would_not_save_are_copied_as_they_are(
    llama: Path, tmp_path: Path, generation: dict, config: dict
) -> None:
    """How text is sampled is no reason to lose a calibration."""
    file = llama / "generation_config.json"
    file.write_text(json.dumps(generation))
    whole = json.loads((llama / "config.json").read_text()) | config
    (llama / "config.json").write_text(json.dumps(whole))
    wanted = CalibrationRequest(data=str(tmp_path / "text.txt"), samples=2, seq_len=16)
    out = tmp_path / "out"
    ckpt = open_checkpoint(llama)
    write_handed_over(ckpt, load_text("both", BOTH), out, wanted, arguments={})
    assert (out / "generation_config.json").read_bytes() == file.read_bytes()
    written = json.loads((out / "config.json").read_text())
    assert {key: written[key] for key in config} == config


def refused_before_calibration(folder: Path, tmp_path: Path, words: str, **wanted: Any) -> None:
    request = CalibrationRequest(data=str(tmp_path / "ids.jsonl"), samples=2, seq_len=16, **wanted)
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}))
    ckpt, recipe = open_checkpoint(folder), load_text("both", BOTH)
    began: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmcompressor.oneshot", began.append)
        with pytest.raises(SourceError, match=words):
            write_handed_over(ckpt, recipe, tmp_path / "out", request, arguments={})
    assert not began


def test_a_tokenizer_that_does_not_load_is_told_before_the_calibration(
    llama: Path, tmp_path: Path
) -> None:
    for file in llama.glob("token*"):
        file.unlink()
    refused_before_calibration(llama, tmp_path, "llama: no tokenizer that transformers can load")


def test_a_config_that_does_not_save_is_told_before_the_calibration(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class of the checkpoint's own."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (llama / "configuration_unsaved.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass UnsavedConfig(LlamaConfig):\n"
        "    model_type = 'unsaved'\n\n    def to_json_file(self, *args, **kwargs):\n"
        "        raise TypeError('a kernel is no JSON')\n"
    )
    config = json.loads((llama / "config.json").read_text()) | {
        "model_type": "unsaved",
        "auto_map": {"AutoConfig": "configuration_unsaved.UnsavedConfig"},
    }
    (llama / "config.json").write_text(json.dumps(config))
    words = "llama: transformers can load the model's config but not save it: a kernel is no JSON"
    refused_before_calibration(llama, tmp_path, words, trust_remote_code=True)


def test_what_llm_compressor_cannot_run_is_one_message(llama: Path, tmp_path: Path) -> None:
    """Groups that do not divide the columns."""
    odd = BOTH.replace("scheme: W4A16", "config_groups: {g: {targets: [Linear], weights: "
                       "{num_bits: 4, strategy: group, group_size: 96}}}")  # fmt: skip
    wanted = CalibrationRequest(data=str(tmp_path / "text.txt"), samples=2, seq_len=16)
    ckpt = open_checkpoint(llama)
    with pytest.raises(
        SourceError, match="llama: llm-compressor cannot run SmoothQuantModifier on it: "
    ):
        write_handed_over(ckpt, load_text("both", odd), tmp_path / "out", wanted, arguments={})
