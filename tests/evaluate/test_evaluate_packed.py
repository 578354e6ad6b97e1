"""Sources that other makers quantized: schemes are tried on the weights that they decode to."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluate_models import rows_of
from test_evaluate_compare import TEXT
from tiny.foreign import (
    AWQ_METHOD,
    FP8_METHOD,
    Foreign,
    awq,
    deepseek,
    fp8,
    fp8_method,
    gpt_oss,
    gptq,
    gptq_method,
    nvfp4,
    nvfp4_method,
    unquantized,
    write,
)
from tiny.rows import write_rows
from typer.testing import CliRunner

from ckptq.checkpoint.open import open_checkpoint
from ckptq.cli import app
from ckptq.errors import UsageError
from ckptq.evaluate.request import EvaluationRequest, evaluate_request
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.weights.schemes import SchemeWeights
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme

BF16 = torch.bfloat16
SOURCES: dict[str, Callable[[Path], Foreign]] = {
    "gptq": lambda folder: write(folder, gptq(), gptq_method()),
    "awq": lambda folder: write(folder, awq, AWQ_METHOD),
    "modelopt fp8": lambda folder: write(folder, fp8, fp8_method(), BF16),
    "modelopt nvfp4": lambda folder: write(folder, nvfp4, nvfp4_method(), BF16),
    "deepseek": lambda folder: write(folder, deepseek, FP8_METHOD, BF16),
}


def under(folder: Path, scheme: str) -> dict[str, torch.Tensor]:
    """All tensors of a source, quantized in memory by a scheme."""
    ckpt = open_checkpoint(folder)
    weights = SchemeWeights(ckpt, make_plan(ckpt, load_scheme(scheme)))
    return weights.load(weights.names())


@pytest.mark.parametrize("format", SOURCES)
def test_a_scheme_gives_what_it_gives_on_the_unquantized_model(tmp_path, format):
    foreign = SOURCES[format](tmp_path / "source")
    plain = unquantized(foreign, tmp_path / "plain")
    found, wanted = under(foreign.folder, "fp8-dynamic"), under(plain, "fp8-dynamic")
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_experts_in_one_tensor_are_those_that_their_codes_mean(tmp_path):
    foreign = gpt_oss(tmp_path / "source")
    found = under(foreign.folder, "fp8-dynamic")
    assert not [name for name in found if name.endswith(("_blocks", "_scales"))]
    for name, weight in foreign.weights.items():
        assert torch.equal(found[name], weight)


def test_a_packed_source_alone_is_compared_with_schemes_of_it(tmp_path):
    source, text = gpt_oss(tmp_path / "source").folder, tmp_path / "text.jsonl"
    write_rows(text, rows_of((20, 15)))
    words = ["evaluate", str(source), "--schemes", "fp8-dynamic", "--data", str(text), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["rows"][0]["weights"] == "fp8-dynamic"
    with pytest.raises(UsageError, match="--source names the checkpoint it was made from"):
        evaluate_request(source, EvaluationRequest(data=str(text)))


def test_rows_of_a_packed_source(tmp_path):
    """gpt-oss: its attention in FP8, and a cache with scales of this text."""
    source = open_checkpoint(gpt_oss(tmp_path / "source").folder)
    schemes = [load_scheme(name) for name in ("fp8-dynamic", "fp8-per-head")]
    found = evaluate(source, TEXT, schemes=schemes, caches=["fp8-per-tensor"])
    kl = {(row.weights, row.kv_cache): row.measures.kl for row in found.rows}
    assert not found.failed
    assert kl.keys() == {
        ("source", "fp8-per-tensor"), ("fp8-dynamic", "bf16"), ("fp8-per-head", "fp8-per-head"),
    }  # fmt: skip
    assert all(0 < one < 1 for one in kl.values())
