"""Layers that read another layer's KV cache get the scales that it is written with, under their own
names: vLLM looks for them there, takes 1.0 where it finds none, and reads the cache with it."""

import json
import shutil

import pytest
import torch
from calibrate_models import HEADS, KV_HEADS
from safetensors.torch import load_file, save_file
from tiny.rows import write_rows

from ckptq.calibrate.request import CalibrationRequest
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

OWNERS = {2: 0, 3: 1}
"""Layer -> the one whose cache it reads: the last before layer 2 of the same type."""


def scale_names(layer):
    return {which: f"model.layers.{layer}.self_attn.{which}_scale" for which in "qkv"}


def written(ckpt, tmp_path, scheme):
    """The whole way, on text that is made up here."""
    text = tmp_path / "rows.jsonl"
    rows = [[(7 * i + 3 * j) % 120 + 3 for j in range(24)] for i in range(4)]
    write_rows(text, rows)
    calibration = CalibrationRequest(data=str(text), samples=4, seq_len=24)
    request = QuantizeRequest(
        model=ckpt.path, recipe=load_scheme(scheme), out=tmp_path / "out", calibration=calibration
    )
    return quantize(request).out


def with_unused_projections(ckpt, folder):
    """As the hub has them: k_proj and v_proj that no forward of the last layers looks at."""
    shutil.copytree(ckpt.path, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer, owner in OWNERS.items():
        for side in ("k_proj", "v_proj"):
            name = f"model.layers.{owner}.self_attn.{side}.weight"
            other = name.replace(f".{owner}.", f".{layer}.")
            tensors.setdefault(other, 100 * torch.randn_like(tensors[name]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


@pytest.mark.parametrize("stored", [True, False], ids=["unused k/v stored", "not stored"])
@pytest.mark.parametrize("scheme", ["fp8-per-head", "kv-fp8-per-tensor"])
@pytest.mark.parametrize("family", ["gemma3n", "gemma4-e"])
def test_scales_are_those_of_the_layer_whose_cache_it_is(saved, tmp_path, family, scheme, stored):
    ckpt = saved(family)
    if stored:
        ckpt = with_unused_projections(ckpt, tmp_path / "hub")
    assert ("model.layers.3.self_attn.k_proj.weight" in ckpt.tensors) is stored
    out = written(ckpt, tmp_path, scheme)
    tensors = load_file(out / "model.safetensors")
    per_head = scheme == "fp8-per-head"
    for layer, owner in OWNERS.items():
        ours, theirs = scale_names(layer), scale_names(owner)
        for which in "kv":
            assert torch.equal(tensors[ours[which]], tensors[theirs[which]])
        assert not torch.equal(tensors[ours["q"]], tensors[theirs["q"]])
        assert tensors[ours["k"]].shape == ((KV_HEADS, 1, 1) if per_head else (1,))
        assert tensors[ours["q"]].shape == ((HEADS, 1, 1) if per_head else (1,))
    assert not torch.equal(*(tensors[scale_names(layer)["k"]] for layer in (0, 1)))
    report = verify(out, ckpt.path, engine="vllm")
    assert report.ok, report.findings


def test_a_scale_that_is_missing_or_another_is_a_fault(saved, tmp_path):
    ckpt = saved("gemma3n")
    out = written(ckpt, tmp_path, "fp8-per-head")
    file, name = out / "model.safetensors", scale_names(2)["k"]
    whole = load_file(file)
    save_file({**whole, name: whole[name] * 2}, file, metadata={"format": "pt"})
    faults = [(f.code, f.tensor) for f in verify(out, ckpt.path).findings]
    assert faults == [("shared-cache-scale", name)]
    del whole[name]
    save_file(whole, file, metadata={"format": "pt"})
    (missing,) = verify(out, ckpt.path).findings
    assert (missing.code, missing.tensor) == ("kv-scale-missing", name)
    assert missing.wanted == scale_names(0)["k"]
    assert "reads the cache of model.layers.0.self_attn with it" in missing.found


def test_heads_of_their_own_number_make_all_scales_per_tensor(saved, tmp_path):
    """Gemma-4's global layers: vLLM would refuse scales per head, of all layers."""
    ckpt = saved("gemma4")
    plan = make_plan(ckpt, load_scheme("fp8-per-head"))
    (told,) = plan.told
    assert told.startswith("attention and cache scales are per tensor instead of per head: 2 of 4")
    assert "(model.layers.1.self_attn: 4 and 1; config.json: 4 and 2)" in told
    out = written(ckpt, tmp_path, "fp8-per-head")
    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    assert declared["kv_cache_scheme"]["strategy"] == "tensor"
    groups = [g for g in declared["config_groups"].values() if g["weights"] is None]
    assert [g["input_activations"]["strategy"] for g in groups] == ["tensor"]
    assert load_file(out / "model.safetensors")[scale_names(1)["k"]].shape == (1,)
    assert verify(out, ckpt.path, engine="vllm").ok
    as_written = make_plan(ckpt, load_scheme("fp8-per-head"), permutable=False)
    assert not as_written.told
    assert as_written.attention.strategy == "attn_head"


def test_layers_that_are_alike_keep_their_heads(saved):
    for family in ("gemma4-e", "gemma3n", "llama"):
        plan = make_plan(saved(family), load_scheme("fp8-per-head"))
        assert not plan.told
        assert plan.attention.strategy == "attn_head"
