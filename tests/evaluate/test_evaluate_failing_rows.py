"""A row that fails ends alone, is told, and makes the command fail; progress goes to the last
piece of text."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict

import pytest
from evaluate_models import LAYERS
from safetensors.torch import load_file, save_file
from test_evaluate_command import run
from test_evaluate_compare import TEXT
from tiny.rows import write_rows

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import MachineError, SourceError
from ckptq.evaluate.caches import simulated
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.weights.schemes import SchemeWeights
from ckptq.recipes.load import load_scheme

CACHES = ["fp8-per-head", "int4-per-token-head", "int8-per-token-head"]

FATAL = 2 * (len(TEXT.lines) + 1) + 1
"""The call, two for a sample, that fails: in the second layer, at the second sample."""


@pytest.fixture
def int4_fails(monkeypatch):
    calls = []
    rounded = simulated._dynamic

    def failing(x, cache):
        calls.append(cache.mode)
        if cache.mode == CACHES[1] and calls.count(cache.mode) == FATAL:
            raise MachineError("no room for this cache")
        return rounded(x, cache)

    monkeypatch.setattr(simulated, "_dynamic", failing)
    return calls


def test_a_cache_that_fails_in_a_layer_ends_alone(saved, int4_fails):
    source = saved("llama")
    found = evaluate(source, TEXT, caches=CACHES, schemes=[load_scheme("w8a8")])
    wanted = evaluate(source, TEXT, caches=CACHES[::2], schemes=[load_scheme("w8a8")])
    assert [row.outcome for row in found.rows] == [row.outcome for row in wanted.rows]
    assert found.control.outcome == wanted.control.outcome
    [failed] = found.failed
    assert (failed.weights, failed.kv_cache) == ("llama", "int4-per-token-head")
    assert failed.error == "no room for this cache"
    assert found.failures == (
        "llama, int4-per-token-head cache: not measured: no room for this cache",
    )
    assert not found.ok
    assert wanted.ok
    # it ran no further
    assert int4_fails.count(CACHES[1]) == FATAL


@pytest.mark.parametrize("when", ["embedding", "layer", "head"])
def test_a_scheme_whose_weights_fail_ends_alone(saved, monkeypatch, when):
    load, source = SchemeWeights.load, saved("llama")
    name = {"embedding": "embed_tokens", "layer": "layers.1.", "head": "lm_head"}[when]

    def failing(self, names):
        if "w4a16" in self.label and any(name in each for each in names):
            raise SourceError(f"cannot read {name}")
        return load(self, names)

    monkeypatch.setattr(SchemeWeights, "load", failing)
    schemes = [load_scheme(each) for each in ("w4a16", "w8a8")]
    found = evaluate(source, TEXT, schemes=schemes)
    assert [row.weights for row in found.rows] == ["w8a8"]
    assert [str(each) for each in found.failed] == [
        f"w4a16, bf16 cache: not measured: cannot read {name}"
    ]
    wanted = evaluate(source, TEXT, schemes=schemes[1:])
    assert found.rows[0].outcome == wanted.rows[0].outcome
    assert found.to_dict()["failed"][0]["weights"] == "w4a16"
    with pytest.raises(SourceError, match=f"cannot read {name}"):
        evaluate(source, TEXT, schemes=schemes[:1])  # nothing is left to say


def test_a_weight_that_is_not_finite_is_named(saved, tmp_path):
    shutil.copytree(saved("llama").path, tmp_path / "source")
    [file] = (tmp_path / "source").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"'model\.layers\.2\.mlp\.up_proj': NaN or Inf"):
        evaluate(open_checkpoint(file.parent), TEXT, schemes=[load_scheme("fp8-dynamic")])


def test_the_command_shows_what_is_left_and_fails(saved, tmp_path, int4_fails):
    data = write_rows(tmp_path / "text.jsonl", [list(line.token_ids[1:]) for line in TEXT.lines])
    words = (saved("llama").path, "--kv-cache", ",".join(CACHES), "--data", data, "--json")
    code, text = run(*words, "--device", "cpu")
    assert code == 1
    found = json.loads(text)
    assert [row["kv_cache"] for row in found["rows"]] == CACHES[::2]
    assert found["failures"] == [str_of(found["failed"][0])]


def str_of(failed) -> str:
    return f"{failed['weights']}, {failed['kv_cache']} cache: not measured: {failed['error']}"


def test_progress_goes_through_the_layers_and_the_output_head(saved, monkeypatch):
    monkeypatch.setattr("ckptq.evaluate.pieces.CHUNK_ELEMENTS", 64 * 5)  # five positions
    totals: dict[str, int] = {}
    seen: dict[str, list[str]] = defaultdict(list)

    def begin(task, total, unit="bytes"):
        totals[task] = total
        return lambda what, done: seen[task].extend([what] * done)

    evaluate(saved("llama"), TEXT, caches=["int8-per-token-head"], begin=begin)
    assert {task: len(each) for task, each in seen.items()} == totals
    assert totals["evaluate"] == LAYERS
    pieces = sum(-(-(len(line.token_ids) - 1) // 5) for line in TEXT.lines)
    assert totals["output head"] == 4 * pieces
    assert set(seen["output head"]) == {"source", "zero", "control", "source / int8-per-token-head"}
