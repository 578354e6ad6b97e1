"""Models with other layers beside attention: layers that cache keys and values get scales, and of
what transformers caches there."""

from pathlib import Path

import pytest
import torch
import transformers
from families.sources import save
from safetensors.torch import load_file
from tiny.rows import write_rows

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme

TOKENS = [(7 * i) % 190 + 3 for i in range(16)]
ATTENTION = {
    "bamba": {1: "model.layers.1.self_attn", 3: "model.layers.3.self_attn"},
    "qwen3_next": {3: "model.layers.3.self_attn"},
    "nemotron_h": {2: "backbone.layers.2.mixer"},
}
"""Family -> layer that attends -> its attention on disk."""


@pytest.mark.parametrize("family", ATTENTION)
def test_scales_are_of_what_the_attention_layers_cache(tmp_path: Path, family: str) -> None:
    source, out = save(family, tmp_path), tmp_path / "out"
    text = CalibrationRequest(data=str(write_rows(tmp_path / "rows.jsonl", [TOKENS])), samples=1)
    recipe = load_scheme("kv-fp8-per-tensor")
    quantize(QuantizeRequest(model=source, recipe=recipe, out=out, calibration=text))
    tensors = load_file(out / "model.safetensors")
    scaled = {name.rpartition(".")[0] for name in tensors if name.endswith(".k_scale")}
    assert scaled == set(ATTENTION[family].values())
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        cache = model(torch.tensor([TOKENS]), use_cache=True).past_key_values
    for layer, module in ATTENTION[family].items():
        for which, held in (("k", cache.layers[layer].keys), ("v", cache.layers[layer].values)):
            wanted = torch.tensor([held.abs().max().double().item() / 448]).bfloat16()
            assert torch.equal(tensors[f"{module}.{which}_scale"], wanted)
