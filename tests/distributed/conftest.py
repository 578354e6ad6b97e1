from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny.models import TOKENS, causal
from tiny.rows import token_rows, write_rows

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.output import RunOptions
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    **TOKENS,
}


@dataclass(frozen=True)
class Given:
    """What the commands read."""

    llama: Path
    mixtral: Path
    text: Path

    def request(self, out: Path) -> QuantizeRequest:
        return QuantizeRequest(
            model=self.llama,
            recipe=load_scheme("fp8-per-head"),
            out=out,
            calibration=CalibrationRequest(data=str(self.text), batch_size=2),
            shard_bytes=10_000,
            options=RunOptions(device="cpu"),
        )


@pytest.fixture(scope="session")
def given(tmp_path_factory) -> Given:
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(3)
    models = {
        "llama": causal("Llama", SIZES),
        "mixtral": causal("Mixtral", SIZES, num_local_experts=4, num_experts_per_tok=2),
    }
    for name, model in models.items():
        model.bfloat16().save_pretrained(folder / name)
    text = write_rows(folder / "rows.jsonl", token_rows([24, 17, 9, 24, 24, 13, 21]))
    return Given(folder / "llama", folder / "mixtral", text)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as the ranks of these tests have: sums of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory) -> Path:
    """What one process makes of the request."""
    return quantize(given.request(tmp_path_factory.mktemp("whole") / "out")).out
