"""Models that vLLM does not load whatever their scheme: told by the plan and by `verify`.

Each was seen to be refused by the real vLLM 0.32; the twins were seen to load.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from ckptq.checkpoint.open import open_checkpoint
from ckptq.cli import app
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.engines.table import load_table
from ckptq.plan.doubts import transformers_doubts, vllm_doubts
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify
from families.hub import renamed
from families.sources import make, save, save_variant

SMALL = {"vocab_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
CONFIGS = {
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 128},
    "gpt_neo": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128,
        "attention_types": [[["global", "local"], 1]],
    },
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128,
             "vocab_size": 128},
    "zamba": {
        **SMALL, "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2,
        "n_mamba_heads": 2, "use_mamba_kernels": False, "pad_token_id": 0,
    },
    "biogpt": {**SMALL, "intermediate_size": 128},
    "helium": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip
"""Of which vLLM has no class of its own; the last two it runs by way of transformers."""


def source_of(family: str, folder: Path) -> Path:
    if family not in CONFIGS:
        return save(family, folder)
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    make(config, "CausalLM").save_pretrained(folder / family)
    return folder / family


def told(source: Path, scheme: str = "fp8-dynamic") -> list[str]:
    return list(vllm_doubts(make_plan(open_checkpoint(source), load_scheme(scheme))))


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("codegen", "has no class for CodeGenForCausalLM, and its transformers class"),
        ("gpt_neo", "an attention that vLLM cannot replace"),
        ("xglm", "an attention that vLLM cannot replace"),
        ("bamba", "does not load BambaForCausalLM, quantized or not: Layer 0"),
        ("dbrx", "KeyError: 'blocks.0.ffn.experts.w13_weight'"),
        ("mpt", "was supported in vLLM until v0.28.0, and is not supported anymore"),
        ("olmo_hybrid", "no module or parameter named 'layers.0.attention_layer_norm'"),
    ],
)
def test_a_model_that_vllm_does_not_load_is_told(tmp_path: Path, family: str, said: str) -> None:
    (doubt,) = told(source_of(family, tmp_path))
    assert said in doubt
    assert "\n" not in doubt


@pytest.mark.parametrize("family", ["biogpt", "helium", "jetmoe", "qwen3_vl_moe", "falcon_h1"])
def test_a_model_that_it_loads_is_no_doubt(tmp_path: Path, family: str) -> None:
    """Qwen3-VL-MoE's source of transformers 5 it does not load, and what becomes of it it does."""
    assert told(source_of(family, tmp_path)) == []


@pytest.mark.parametrize(
    ("family", "new"), [("llama", "model.model."), ("qwen3", "language_model.model."),
                        ("qwen2", ""), ("granite", "transformer.")],
)  # fmt: skip
def test_names_that_its_loader_does_not_take(tmp_path: Path, family: str, new: str) -> None:
    source = save(family, tmp_path)
    other = save_variant(
        source, tmp_path / "other", lambda t: renamed(t, ((r"^model\.", new),)), {}
    )
    (doubt,) = told(other)
    assert f"under these names (such as {new}layers.0." in doubt
    assert told(source) == []


def test_other_names_that_its_loader_renames_are_no_doubt(tmp_path: Path) -> None:
    """Gemma-3 as the hub had it before transformers 5."""
    source = save("gemma3", tmp_path)
    names = ((r"^model\.language_model\.", "language_model.model."), (r"^model\.", ""))
    other = save_variant(source, tmp_path / "other", lambda t: renamed(t, names), {})
    assert any(n.startswith("language_model.model.") for n in open_checkpoint(other).tensors)
    assert told(other) == []


def test_the_last_line_offers_what_loads_it(tmp_path: Path) -> None:
    source, llama = source_of("codegen", tmp_path), save("llama", tmp_path)
    runner = CliRunner()
    done = runner.invoke(app, ["quantize", str(source), "-s", "fp8-dynamic", "--dry-run"])
    assert done.exit_code == 0
    assert "has no class for CodeGenForCausalLM" in " ".join(done.stderr.split())
    done = runner.invoke(app, ["quantize", str(llama), "-s", "fp8-dynamic", "--dry-run"])
    assert "has no class" not in done.stderr
    out = tmp_path / "out"
    arguments = ["quantize", str(source), "-s", "fp8-dynamic", "-o", str(out)]
    done = runner.invoke(app, arguments)
    assert "vllm serve" not in done.stdout
    call = f"transformers.CodeGenForCausalLM.from_pretrained({str(out)!r})"
    assert call in "".join(done.stdout.split("\n"))
    result = quantize(
        QuantizeRequest(model=llama, recipe=load_scheme("fp8-dynamic"), out=tmp_path / "llama-out")
    )
    assert result.serve is not None


def test_the_simulation_says_what_vllm_would_not_load(tmp_path: Path) -> None:
    out = quantized(source_of("gpt_neo", tmp_path), tmp_path / "out")
    assert verify(out).ok
    (fault,) = verify(out, engine="vllm").findings
    assert fault.code == "engine-refuses"
    assert "according to its table" in fault.found
    assert "GPTNeoForCausalLM" in fault.found


def test_the_simulation_says_what_its_table_has_not_seen(tmp_path: Path) -> None:
    """Never a silent "right" of what nobody has looked at; twins: families of the table."""
    out = quantized(source_of("biogpt", tmp_path), tmp_path / "out")
    report = verify(out, engine="vllm")
    assert report.ok
    (note,) = [note for note in report.notes if note.code == "engine-unseen"]
    assert "12 of 12 quantized Linears" in note.found
    assert "biogpt.layers.*.fc1" in note.found
    for family in ("llama", "qwen3_moe", "falcon_h1"):
        out = quantized(save(family, tmp_path), tmp_path / f"{family}-out")
        assert "engine-unseen" not in {note.code for note in verify(out, engine="vllm").notes}


def test_what_the_plan_leaves_is_no_matter_of_the_table(tmp_path: Path) -> None:
    """A Linear of somebody else's among those of a known class."""
    source = save("mistral", tmp_path)
    added = {"model.layers.1.mlp.gate_x.weight": torch.ones(128, 128, dtype=torch.bfloat16)}
    other = save_variant(source, tmp_path / "other", lambda t: {**t, **added}, {})
    out = quantized(other, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    assert "model.layers.1.mlp.gate_x" in quantization["ignore"], "the plan leaves it"
    assert "engine-unseen" not in {note.code for note in verify(out, engine="vllm").notes}


def quantized(source: Path, out: Path) -> Path:
    request = QuantizeRequest(model=source, recipe=load_scheme("fp8-dynamic"), out=out)
    return quantize(request).out


def test_a_classifier_is_served_by_its_language_models_class() -> None:
    table = load_table()
    assert table.has_class(["LlamaForSequenceClassification"])
    assert table.has_class(["Qwen2ForTokenClassification"])
    assert not table.has_class(["CodeGenForCausalLM"])
    assert not table.has_class(["XGLMForSequenceClassification"])


def test_a_class_of_vllms_that_nobody_has_seen_is_told(tmp_path: Path) -> None:
    """HY-V4: it merges linear_gate with up_proj, and leaves half of their scales empty."""
    config = transformers.AutoConfig.for_model(
        "hy_v4", **SMALL, intermediate_size=128, num_key_value_heads=4, head_dim=16,
        q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1,
        first_k_dense_replace=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    make(config, "CausalLM").save_pretrained(tmp_path / "hy_v4")
    for source, said in ((tmp_path / "hy_v4", True), (save("llama", tmp_path), False)):
        notes: list[str] = []
        recipe = load_scheme("fp8-dynamic")
        quantize(
            QuantizeRequest(model=source, recipe=recipe, out=tmp_path / f"{said}"),
            note=notes.append,
        )
        assert any("a class of its own for HYV4ForCausalLM" in note for note in notes) == said


@pytest.mark.parametrize(("family", "served"), [("zamba", False), ("zamba2", True)])
def test_vllm_is_named_only_where_it_serves_what_transformers_does_not(
    tmp_path: Path, family: str, served: bool
) -> None:
    plan = make_plan(open_checkpoint(source_of(family, tmp_path)), load_scheme("fp8-dynamic"))
    (line,) = (line for line in transformers_doubts(plan) if "shared between layers" in line)
    assert line.endswith("; vLLM can") == served
    assert any(vllm_doubts(plan)) != served
