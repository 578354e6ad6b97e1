"""Every cell passes `verify`; cells that transformers reads are read, and answer as the source."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from matrix_cells import FORMATS, Cell
from matrix_models import FAMILIES

from ckptq.verify.run import verify

PROMPT = torch.tensor([[(7 * i + 3) % 500 for i in range(24)]])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_finds_nothing(cell: Cell, family: str, format: str) -> None:
    source, out = cell(family, format)
    report = verify(out, source)
    assert report.findings == ()
    assert report.checks["linears compared"] == report.checks["linears quantized"] > 0


@pytest.mark.parametrize("format", ["fp8-block", "w4a16-asym"])
def test_q_k_and_v_have_their_group_as_one_matrix_too(cell: Cell, format: str) -> None:
    """vLLM up to 0.25 tries a merged Linear's own name, then its class, then its parts' names."""
    _, out = cell("llama4 dense", format)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    targets = {target: name for name, group in groups.items() for target in group["targets"]}
    for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        module = f"language_model.model.layers.1.self_attn.{name}"
        found = [t for t in targets if t.startswith("re:") and re.match(t[3:], module)]
        assert [targets[t] for t in found] == ["linear_qkv"]
    assert "Linear" in targets


def log_probabilities(folder) -> torch.Tensor:
    """Of the token after PROMPT; every tensor must have found its place."""
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, report = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT, use_cache=False).logits[0, -1].float().log_softmax(-1)


# (family, format): mean |delta log probability| over the source's top 20 that rounding may cost
LOADED = {
    ("llama", "fp8-dynamic"): 0.1,
    ("llama", "w4a16-asym"): 0.3,
    ("qwen3", "fp8-block"): 0.1,
    ("mixtral", "fp8-dynamic"): 0.2,
    ("qwen3-moe", "w4a16-g32"): 0.4,
    ("llama4 dense", "w4a16-asym"): 0.5,
    ("llama4 moe", "fp8-dynamic"): 0.3,
}


@pytest.mark.parametrize(("family", "format"), LOADED)
def test_transformers_reads_it(cell: Cell, family: str, format: str) -> None:
    source, out = cell(family, format)
    want, got = log_probabilities(source), log_probabilities(out)
    top = want.topk(20).indices
    assert (want - got)[top].abs().mean() < LOADED[family, format]
