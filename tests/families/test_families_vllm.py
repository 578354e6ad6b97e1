"""Every family through quantize, and into the real vLLM (VLLM_PYTHON): loaded whole, or foreseen.

The judge is vLLM's own class, which must load the result and leave nothing empty that it fills
from the source. Where it does not, the plan has refused the work or told so beforehand, and
`verify --engine vllm --vllm-python` says what vLLM did.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from families.cells import cells, make, write_token_ids
from families.hub import FP8_BLOCK
from families.sources import FAMILIES, save
from families.vllm_cells import cell, faults, judge, load, warm

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM"),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm(PYTHON or "", tmp_path_factory.mktemp("vllm")) as imitation:
        yield imitation


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_token_ids(tmp_path_factory.mktemp("data") / "ids.jsonl")


@cache
def loaded(python: Path, source: Path) -> dict[str, Any]:
    return load(python, source)


@pytest.mark.parametrize(("family", "scheme"), cells((*FAMILIES, *FP8_BLOCK)))
def test_vllm_loads_it_or_it_was_foreseen(
    python: Path, sources: Path, data: Path, tmp_path: Path, family: str, scheme: str
) -> None:
    source = save(family, sources)
    found = cell(python, source, scheme, data, tmp_path / "out", loaded(python, source))
    if found.outcome == "source":
        pytest.skip(f"vLLM does not load the source itself: {found.reason}")
    assert found.outcome != "WRONG", found.reason


@pytest.mark.parametrize(
    "lost", ["layers.1.mlp.down_proj.weight_scale", "layers.0.self_attn.k_proj.weight",
             "layers.1.mlp.experts.2.up_proj.weight_scale"],
)  # fmt: skip
def test_what_is_lost_is_seen_by_the_judge_and_by_verify(
    python: Path, sources: Path, data: Path, tmp_path: Path, lost: str
) -> None:
    """The twin of the matrix: a hole that vLLM itself says nothing of."""
    family = "qwen3_moe" if "experts" in lost else "llama"
    source = save(family, sources)
    made = make(source, "fp8-dynamic", tmp_path / "out", data)
    assert made.out is not None
    theirs = loaded(python, source)
    assert judge(python, source, theirs, made, "fp8-dynamic").outcome == "loaded"
    remove(made.out, f"model.{lost}")
    assert "1 parameters not filled" in faults(load(python, made.out), theirs, cached=False)
    found = judge(python, source, theirs, made, "fp8-dynamic")
    assert found.outcome == "WRONG"
    assert found.reason.startswith("untold: "), "verify has seen it"


def remove(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
