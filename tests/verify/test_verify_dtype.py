"""Formats that compressed-tensors decompresses into bfloat16, in models of another dtype."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny.models import causal

from ckptq.convert.output import RunOptions
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
CASES = [
    ("nvfp4a16", "float16", False),
    ("nvfp4a16", "bfloat16", True),
    ("mxfp4a16", "float32", False),
    ("mxfp8a16", "float16", False),
    ("w4a16-g32", "float16", True),
    ("fp8-dynamic", "float16", True),
]


@pytest.mark.parametrize(("scheme", "dtype", "runs"), CASES)
def test_what_does_not_run_in_transformers_is_foreseen_and_found(tmp_path, scheme, dtype, runs):
    """Half or float against bfloat16, when the model runs; the weights on disk are bfloat16."""
    source, out, told = tmp_path / "source", tmp_path / "out", []
    causal("Llama", SIZES).to(torch.bfloat16).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    request = QuantizeRequest(
        model=source, recipe=load_scheme(scheme), out=out, options=RunOptions(device="cpu")
    )
    quantize(request, note=told.append)
    assert any("into bfloat16" in line for line in told) is not runs
    found = verify(out, engine="transformers").findings
    assert [one.code for one in found] == [] if runs else ["engine-refuses"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    if runs:
        assert model(torch.arange(4)[None]).logits.isfinite().all()
        return
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.arange(4)[None])
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert model(torch.arange(4)[None]).logits.isfinite().all()
