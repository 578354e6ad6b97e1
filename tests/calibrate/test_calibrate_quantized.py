"""Calibrating a quantized checkpoint is calibrating the model that its codes and scales stand for.

That model is made here from the stored tensors by hand and saved without quantization.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from calibrate_models import samples_of, token_rows
from safetensors.torch import load_file, save_file

from ckptq.calibrate.run import calibrate
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme

EXPERTS = re.compile(r"(.*\.experts)\.0\.gate_proj\.weight")
SAMPLES = samples_of(token_rows([24, 17, 9]))


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Codes times the scales of their rows, in the scales' dtype."""
    stored = load_file(folder / "model.safetensors")
    return {
        name: t.to(scale.dtype) * scale if (scale := stored.get(f"{name}_scale")) is not None else t
        for name, t in stored.items()
        if not name.endswith("_scale")
    }


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama-4's experts in their 3-D tensors, gate before up, turned."""
    made = {name: t for name, t in tensors.items() if ".experts." not in name}
    for experts in [m[1] for m in map(EXPERTS.fullmatch, tensors) if m]:
        gate, up, down = (stacked(tensors, experts, f"{p}_proj") for p in ("gate", "up", "down"))
        made[f"{experts}.gate_up_proj"] = torch.cat([gate, up], -1)
        made[f"{experts}.down_proj"] = down
    return made


def stacked(tensors: dict[str, torch.Tensor], experts: str, projection: str) -> torch.Tensor:
    count = sum(name.startswith(f"{experts}.") for name in tensors) // 3
    return torch.stack([tensors[f"{experts}.{e}.{projection}.weight"].t() for e in range(count)])


def plain(ckpt: Checkpoint, folder: Path) -> Checkpoint:
    folder.mkdir()
    config = {k: v for k, v in ckpt.config.items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dequantized(ckpt.path)
    if config["model_type"] == "llama4":
        tensors = fused(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.mark.parametrize("family", ["llama", "llama4", "mixtral"])
def test_scales_are_those_of_the_model_that_it_stands_for(saved, tmp_path, family):
    request = QuantizeRequest(
        model=saved(family).path, recipe=load_scheme("fp8-dynamic"), out=tmp_path / "fp8"
    )
    ckpt = open_checkpoint(quantize(request).out)
    found = calibrate(ckpt, SAMPLES).tensors
    wanted = calibrate(plain(ckpt, tmp_path / "plain"), SAMPLES).tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    source = calibrate(saved(family), SAMPLES).tensors
    assert any(not torch.equal(source[name], wanted[name]) for name in wanted)
