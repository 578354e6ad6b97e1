"""Tiny models of four layers that search chooses for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from search_models import save_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("Llama", tmp_path_factory.mktemp("search") / "llama")


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts in each layer."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return save_model("Qwen3Moe", tmp_path_factory.mktemp("search") / "experts", **sizes)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny.rows import token_rows, write_rows

    file = tmp_path_factory.mktemp("search") / "rows.jsonl"
    return write_rows(file, token_rows((12, 9), ids=(4, 60)))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
