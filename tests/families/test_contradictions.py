"""A config.json of other sizes than the tensors is refused by name; vLLM would cut them to fit, and
serve that. That no family of tests/families is refused is shown by the tests of the matrix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ckptq.convert.quantize import QuantizeRequest, plan_of
from ckptq.errors import SourceError
from ckptq.recipes.load import load_scheme
from families.sources import save, save_variant


def changed(source: Path, out: Path, field: str, value: object) -> Path:
    """The same tensors under a config that differs in one field, of the text model's if it has
    one."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    holder = config if field in config else config["text_config"]
    assert holder[field] != value
    change = {field: value} if holder is config else {"text_config": holder | {field: value}}
    return save_variant(source, out, dict, change)


def plan(source: Path, scheme: str = "fp8-dynamic") -> None:
    plan_of(QuantizeRequest(model=source, recipe=load_scheme(scheme)))


@pytest.mark.parametrize(
    ("family", "scheme", "field", "value", "said"),
    [
        ("llama", "fp8-dynamic", "num_attention_heads", 8, "q_proj.weight is [256, 256] (exp"),
        ("llama", "fp8-dynamic", "num_key_value_heads", 4, "k_proj.weight is [128, 256] (exp"),
        ("llama", "kv-fp8-per-head", "head_dim", 32, "q_proj.weight is [256, 256] (expected [128"),
        ("llama", "fp8-dynamic", "hidden_size", 128, "embed_tokens.weight is [512, 256] (expected"),
        ("phi3", "w4a16-g32", "intermediate_size", 128, "mlp.gate_up_proj.weight is "),
        ("granite", "w8a8", "vocab_size", 100, "embed_tokens.weight is "),
        ("gpt_neox", "fp8-dynamic", "intermediate_size", 128, "dense_h_to_4h.weight is "),
        ("mixtral", "fp8-dynamic", "num_local_experts", 2, "w1.weight and 7 more make [4, "),
        ("qwen3_moe", "fp8-dynamic", "moe_intermediate_size", 64, "experts.0.gate_proj.weight"),
        ("qwen3_moe_fp8", "repack", "moe_intermediate_size", 64, "experts.0.gate_proj.weight"),
        ("qwen3_fp8", "dequantize", "num_key_value_heads", 1, "k_proj.weight is "),
        ("gpt_oss", "fp8-dynamic", "intermediate_size", 64, "experts.gate_up_proj is "),
        ("deepseek_v3", "fp8-dynamic", "kv_lora_rank", 32, "kv_a_proj_with_mqa.weight is "),
        ("llava", "fp8-dynamic", "intermediate_size", 64, "mlp.gate_proj.weight is "),
        ("llama", "fp8-dynamic", "num_hidden_layers", 3, "declares 3 decoder layers, and the ten"),
        ("glm4_moe_mtp", "fp8-dynamic", "num_hidden_layers", 2, "layers.2 is a layer like the oth"),
    ],
)  # fmt: skip
def test_sizes_of_another_model_are_refused(
    tmp_path: Path, family: str, scheme: str, field: str, value: int, said: str
) -> None:
    source = save(family, tmp_path)
    plan(source, scheme)
    broken = changed(source, tmp_path / "broken", field, value)
    with pytest.raises(SourceError, match=re.escape(said)) as refused:
        plan(broken, scheme)
    assert str(refused.value).startswith(f"{broken}/config.json: ")


def test_one_layer_of_another_size_is_refused(tmp_path: Path) -> None:
    """Layers that are alike on disk need not be in the model."""
    source = save("gemma3n_text", tmp_path)
    plan(source)
    broken = changed(source, tmp_path / "broken", "intermediate_size", [512, 512, 256, 512])
    with pytest.raises(SourceError, match=r"layers\.2\.mlp\.gate_proj\.weight is "):
        plan(broken)
