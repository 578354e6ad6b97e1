"""The real vLLM (VLLM_PYTHON) with caches that `search --kv-bits` leaves in 16 bits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ckptq.verify.engine.vllm import WORKER
from families.cells import make, write_token_ids
from families.sources import save

PYTHON = os.environ.get("VLLM_PYTHON")
SCRIPT = Path(__file__).parent / "in_vllm" / "skipped_caches.py"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM"),
]


def test_vllm_skips_the_layers_of_these_numbers(tmp_path: Path) -> None:
    """It keeps their scales: when that fails, docs/search.md need no longer warn of FlashInfer."""
    made = make(
        save("llama", tmp_path), "fp8-per-head", tmp_path / "out",
        write_token_ids(tmp_path / "ids.jsonl"),
    )  # fmt: skip
    assert made.out is not None
    stored = load_file(made.out / "model.safetensors")
    command = [str(PYTHON), str(SCRIPT), str(WORKER), str(made.out), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) > 1
    for index, (dtype, scales) in enumerate(found.values()):
        assert dtype == ("torch.bfloat16" if index == 1 else "torch.uint8")
        assert scales == stored[f"model.layers.{index}.self_attn.k_scale"].flatten().tolist()
