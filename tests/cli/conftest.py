"""The model that commands are run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in bf16, without a tokenizer; each file of tests has its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        vocab_size=64,
    )
    folder = tmp_path_factory.mktemp("cli") / "llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
