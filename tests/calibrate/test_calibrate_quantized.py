"""Calibrating a quantized checkpoint is calibrating the model that its codes and scales stand for.

That model is made here from the stored tensors by hand and saved without quantization.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrate_models import samples_of
from safetensors.torch import load_file, save_file
from tiny.rows import token_rows

from ckptq.calibrate.run import calibrate
from ckptq.calibrate.scales import save_scales
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import PlanError, UsageError
from ckptq.plan.attention import AttentionPlan
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

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


def with_cache(ckpt: Checkpoint, out: Path, strategy: str = "attn_head") -> Checkpoint:
    """The checkpoint with calibrated cache scales, its weights left as they are stored."""
    scales = out.with_suffix(".scales")
    save_scales(scales, calibrate(ckpt, SAMPLES, attention=AttentionPlan(strategy=strategy)))
    scheme = "kv-fp8-per-head" if strategy == "attn_head" else "kv-fp8-per-tensor"
    request = QuantizeRequest(model=ckpt.path, recipe=load_scheme(scheme), out=out, scales=scales)
    return open_checkpoint(quantize(request).out)


@pytest.mark.parametrize("family", ["llama", "llama4"])
@pytest.mark.parametrize("scheme", ["fp8-dynamic", "w4a16-g32"])
def test_cache_scales_are_added_and_every_stored_byte_stays(saved, tmp_path, family, scheme):
    request = QuantizeRequest(
        model=saved(family).path, recipe=load_scheme(scheme), out=tmp_path / "weights"
    )
    before = open_checkpoint(quantize(request).out)
    after = with_cache(before, tmp_path / "cache")
    old, new = (
        load_file(before.path / "model.safetensors"),
        load_file(after.path / "model.safetensors"),
    )
    assert all(
        torch.equal(new[name].view(torch.uint8), t.view(torch.uint8)) for name, t in old.items()
    )
    added = {name for name in new if name not in old}
    assert {name.rpartition(".")[2] for name in added} == {"q_scale", "k_scale", "v_scale"}
    assert len(added) == 3 * after.text_config["num_hidden_layers"]
    was, now = before.quantization_config, after.quantization_config
    assert {**was, "kv_cache_scheme": now["kv_cache_scheme"]} == now
    assert now["kv_cache_scheme"]["strategy"] == "attn_head"
    report = verify(after.path, before.path)
    assert report.ok, report.findings


def test_old_cache_scales_are_replaced(saved, tmp_path):
    request = QuantizeRequest(
        model=saved("llama").path, recipe=load_scheme("fp8-dynamic"), out=tmp_path / "weights"
    )
    per_head = with_cache(open_checkpoint(quantize(request).out), tmp_path / "head")
    per_tensor = with_cache(per_head, tmp_path / "tensor", "tensor")
    shapes = {t.spec.shape for n, t in per_tensor.tensors.items() if n.endswith(".k_scale")}
    assert shapes == {(1,)}
    assert per_tensor.tensors.keys() == per_head.tensors.keys()
    assert per_tensor.quantization_config["kv_cache_scheme"]["strategy"] == "tensor"
    assert verify(per_tensor.path, per_head.path).ok


def test_weights_that_stay_as_stored_are_not_reordered(saved, tmp_path):
    request = QuantizeRequest(
        model=saved("llama4").path, recipe=load_scheme("fp8-dynamic"), out=tmp_path / "weights"
    )
    again = QuantizeRequest(
        model=quantize(request).out,
        recipe=load_scheme("kv-fp8-per-head"),
        rope_order="half-split",
        out=tmp_path / "cache",
    )
    with pytest.raises(UsageError, match="ckptq permute"):
        quantize(again)


def test_another_method_has_no_place_for_cache_scales(saved, tmp_path):
    ckpt = saved("llama")
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    block = replace(ckpt, config={**ckpt.config, "quantization_config": method})
    with pytest.raises(PlanError, match="'fp8', whose config cannot hold"):
        make_plan(block, load_scheme("kv-fp8-per-head"))
