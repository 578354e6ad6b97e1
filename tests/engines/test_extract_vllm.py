"""The committed table is what vLLM says today, where a vLLM is at hand."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from families.sources import save

import ckptq.engines
from ckptq.engines.table import load_table
from ckptq.engines.tabulate import tabulate

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
SCRIPT = Path(ckptq.engines.__file__).parent / "extract_vllm"


@pytest.mark.engine
@pytest.mark.skipif(not VLLM_PYTHON, reason="VLLM_PYTHON names no Python that has vLLM")
@pytest.mark.parametrize("family", ["qwen3_5_moe_fused", "zamba2"])
def test_the_table_is_what_vllm_says(family: str, tmp_path: Path) -> None:
    source = save(family, tmp_path)
    out = tmp_path / "observations.jsonl"
    command = [str(VLLM_PYTHON), str(SCRIPT), str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    now = tabulate(json.loads(line) for line in out.read_text().splitlines())
    table = load_table()
    assert now["version"] == table.version
    ((name, said),) = now["architectures"].items()
    committed = table.content["architectures"][name]
    assert said["modules"].items() <= committed["modules"].items()
    assert said["written"].items() <= committed["written"].items()
    assert said["experts"].items() <= committed["experts"].items()
    assert {tuple(m) for m in said["merged"]} <= {tuple(m) for m in committed["merged"]}
    assert now["registry"] == table.content["registry"]


def test_the_script_runs_without_ckptq() -> None:
    """It is run in vLLM's environment; a module of ckptq named vllm must not hide vLLM, either."""
    for path in SCRIPT.glob("*.py"):
        text = path.read_text()
        assert "import ckptq" not in text
        assert "from ckptq" not in text
    assert not (SCRIPT / "vllm.py").exists()
