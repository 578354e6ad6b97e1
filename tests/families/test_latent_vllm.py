"""The real vLLM (VLLM_PYTHON) with the cache scales of latent attention, as the plan tells it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ckptq.engines.vllm import LATENT_SCALES
from ckptq.verify.engine.vllm import WORKER
from families.cells import make, write_token_ids
from families.sources import save

PYTHON = os.environ.get("VLLM_PYTHON")
SCRIPT = Path(__file__).parent / "in_vllm" / "latent_scales.py"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM"),
]


def test_vllm_loads_the_checkpoint_and_drops_its_latent_scales(tmp_path: Path) -> None:
    """When this fails, vLLM has learned to read them: what plan and docs say is to be changed."""
    data = write_token_ids(tmp_path / "ids.jsonl")
    source = save("deepseek_v3", tmp_path)
    made = make(source, "fp8-per-tensor", tmp_path / "out", data)
    assert any(LATENT_SCALES in said for said in made.vllm)
    assert made.out is not None
    stored = load_file(made.out / "model.safetensors")
    assert 0 < stored["model.layers.0.self_attn.k_scale"].item() < 0.1
    command = [str(PYTHON), str(SCRIPT), str(WORKER), str(made.out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found["cached with"]) == 4
    assert set(found["cached with"].values()) == {1.0}
    assert found["parameters"] == []
