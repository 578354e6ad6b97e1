"""A source that lacks something is refused by name before the work; one that lacks nothing is not.

That no family of tests/families is refused is shown by the tests of the matrix.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ckptq.calibrate.request import CalibrationRequest
from ckptq.calibrate.to_file import ScalesRequest, calibrate_to_file
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.quantize import QuantizeRequest, plan_of
from ckptq.errors import SourceError
from ckptq.recipes.load import load_scheme
from families.cells import write_token_ids
from families.sources import save, save_variant


def without(source: Path, pattern: str, out: Path, **config: object) -> Path:
    def change(tensors):
        left = {n: t for n, t in tensors.items() if not re.search(pattern, n)}
        assert len(left) < len(tensors)
        return left

    return save_variant(source, out, change, config)


def plan(source: Path, scheme: str = "fp8-dynamic") -> None:
    plan_of(QuantizeRequest(model=source, recipe=load_scheme(scheme)))


@pytest.mark.parametrize(
    ("family", "pattern", "said"),
    [
        ("llama", r"layers\.1\.", "lacks model.layers.1."),
        ("qwen3", r"layers\.3\.", "lacks model.layers.3."),
        ("granite", r"layers\.2\.mlp\.up_proj", "lacks model.layers.2.mlp.up_proj.weight,"),
        ("qwen2", r"layers\.0\.self_attn\.k_proj\.bias", "k_proj.bias"),
        ("gemma2", r"layers\.1\.post_feedforward_layernorm", "post_feedforward"),
        ("mistral", r"^lm_head", "lacks lm_head.weight,"),
        ("mixtral", r"layers\.1\..*experts\.2\.w3", "experts.2.w3.weight,"),
        ("qwen3_moe", r"layers\.\d\.mlp\.experts\.3\.", "lacks model.layers.0.mlp.experts.3."),
        ("deepseek_v3", r"layers\.2\.mlp\.experts\.1\.up", "mlp.experts.1.up_proj"),
        ("qwen3_next", r"layers\.0\.linear_attn\.in_proj_ba", "linear_attn.in_proj_ba.weight,"),
        ("llava", r"layers\.1\.self_attn\.o_proj", "self_attn.o_proj.weight,"),
        ("gpt_neox", r"layers\.1\.attention\.query_key_value.weight", "query_key_value.weight,"),
        ("exaone", r"\.h\.1\.", "has no tensor of transformer.h.1; config.json declares"),
    ],
)  # fmt: skip
def test_a_hole_is_refused_by_name(tmp_path: Path, family: str, pattern: str, said: str) -> None:
    source = save(family, tmp_path)
    plan(source)
    broken = without(source, pattern, tmp_path / "broken")
    with pytest.raises(SourceError) as refused:
        plan(broken)
    assert said in str(refused.value)
    assert str(broken) in str(refused.value)


@pytest.mark.parametrize(
    ("family", "pattern", "said"),
    [
        ("llama", r"\.mlp\.", "lacks model.layers.0.mlp.gate_proj.weight, "),
        ("qwen3", r"\.input_layernorm", "lacks model.layers.0.input_layernorm.weight, "),
        ("qwen3", r"\.q_norm", "lacks model.layers.0.self_attn.q_norm.weight, "),
        ("gemma2", r"\.post_feedforward_layernorm", "post_feedforward_layernorm.weight, "),
        ("granite", r"^model\.norm", "lacks model.norm.weight, "),
        ("phi3", r"^model\.embed_tokens", "lacks model.embed_tokens.weight, "),
        ("mixtral", r"\.experts\.\d+\.w2", "mlp.experts.down_proj, "),
        ("qwen3_moe", r"\.mlp\.gate\.", "lacks model.layers.0.mlp.gate.weight, "),
        ("deepseek_v3_mtp", r"\.kv_a_layernorm", "self_attn.kv_a_layernorm.weight, "),
        ("qwen3_next", r"\.linear_attn\.conv1d", "linear_attn.conv1d.weight, "),
        ("llava", r"language_model.*\.o_proj", "self_attn.o_proj.weight, "),
        ("gpt_neox", r"\.dense_h_to_4h", "mlp.dense_h_to_4h.weight, "),
    ],
)  # fmt: skip
def test_what_no_layer_has_is_refused_by_name(
    tmp_path: Path, family: str, pattern: str, said: str
) -> None:
    source = save(family, tmp_path)
    plan(source)
    with pytest.raises(SourceError) as refused:
        plan(without(source, pattern, tmp_path / "broken"))
    assert said in str(refused.value)


def test_calibration_alone_refuses_a_hole_too(tmp_path: Path) -> None:
    source = save("granite", tmp_path)
    broken = without(source, r"layers\.1\.mlp\.up_proj", tmp_path / "broken")
    text = CalibrationRequest(data=str(write_token_ids(tmp_path / "ids.jsonl")), samples=1)

    def run(model: Path) -> None:
        calibrate_to_file(
            ScalesRequest(
                model=model, recipe=load_scheme("fp8-per-head"),
                output=tmp_path / "scales.safetensors", text=text,
            )
        )  # fmt: skip

    with pytest.raises(SourceError, match=r"lacks model.layers.1.mlp.up_proj.weight, "):
        run(broken)
    assert not list(tmp_path.glob("scales*"))
    run(source)
    assert (tmp_path / "scales.safetensors").is_file()


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.replace(".input_layernorm.", ".ln_one."): t for n, t in tensors.items()}


def test_what_may_be_there_after_all_is_no_hole(tmp_path: Path) -> None:
    """Biases start at zero in transformers; another name may be one that an engine knows."""
    source = save("qwen2", tmp_path)
    plan(without(source, r"\.bias$", tmp_path / "plain"))
    plan(save_variant(source, tmp_path / "renamed", renamed, {}))


def test_more_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    source = save("qwen2", tmp_path)
    config = json.loads((source / "config.json").read_text())
    more = save_variant(source, tmp_path / "more", dict, {
        "num_hidden_layers": config["num_hidden_layers"] + 1,
        "layer_types": [*config["layer_types"], "full_attention"],
    })  # fmt: skip
    with pytest.raises(SourceError, match=r"and \d+ more, which transformers' Qwen2ForCausalLM"):
        plan(more)


def test_scales_alone_need_all_layers_too(tmp_path: Path) -> None:
    broken = without(save("llama", tmp_path), r"layers\.1\.mlp", tmp_path / "broken")
    with pytest.raises(SourceError, match=r"lacks model.layers.1.mlp"):
        plan(broken, "kv-fp8-per-head")


@pytest.mark.parametrize(
    ("family", "pattern", "config"),
    [
        ("llama_tied", r"^lm_head", {}),
        ("gemma3n_text", r"layers\.3\.self_attn\.[kv]_(proj|norm)", {}),
        ("deepseek_v3_mtp", r"layers\.4\.", {}),
        ("llava", r"vision_tower|multi_modal_projector", {}),
        ("qwen3_5_mtp", r"^mtp", {}),
    ],
)
def test_what_may_be_absent_is_no_hole(
    tmp_path: Path, family: str, pattern: str, config: dict[str, object]
) -> None:
    """Tied heads, keys of layers that read another's cache, MTP layers, towers of a text save."""
    source = save(family, tmp_path)
    if not any(re.search(pattern, name) for name in open_checkpoint(source).tensors):
        plan(source)
        return
    plan(without(source, pattern, tmp_path / "less", **config))
