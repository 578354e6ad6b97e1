"""An adapter's matrices that a source holds stay, and transformers leaves them over of both."""

from __future__ import annotations

from pathlib import Path

import torch
from families.sources import save, save_variant

from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify


def quantized(tmp_path: Path, name: str) -> Path:
    source = save("mistral", tmp_path)
    added = {f"model.layers.0.mlp.down_proj.{name}": torch.ones(8, 8, dtype=torch.bfloat16)}
    other = save_variant(source, tmp_path / name, lambda t: {**t, **added}, {})
    request = QuantizeRequest(
        model=other, recipe=load_scheme("fp8-dynamic"), out=tmp_path / f"{name}-out"
    )
    return quantize(request).out


def test_matrices_of_an_adapter_are_no_fault(tmp_path: Path) -> None:
    out = quantized(tmp_path, "lora_A.weight")
    assert verify(out, engine="transformers", headers_only=True).findings == ()


def test_another_tensor_there_is_one(tmp_path: Path) -> None:
    out = quantized(tmp_path, "strange_A.weight")
    found = verify(out, engine="transformers", headers_only=True).findings
    assert "engine-left-over" in {finding.code for finding in found}
