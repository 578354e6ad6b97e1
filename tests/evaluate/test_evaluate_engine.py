import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_evaluate_compare import TEXT

from ckptq.errors import MachineError, UsageError
from ckptq.evaluate.caches.kv_cache import declared_cache
from ckptq.evaluate.outside.engine import EngineRun, engine_row, heads_with_scales, in_vllm
from ckptq.evaluate.outside.harness import Benchmarks, command, run_benchmarks, scores
from ckptq.evaluate.outside.interpreter import last_words
from ckptq.evaluate.outside.vllm_worker import ranks_for
from ckptq.evaluate.result import Thresholds
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Line, Text

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")

RESULTS = {
    "results": {
        "reverse": {
            "alias": "reverse",
            "sample_len": 32,
            "exact_match,none": 0.75,
            "exact_match_stderr,none": 0.01,
            "exact_match,flexible": 0.875,
            "exact_match_stderr,flexible": "N/A",
        }
    },
    "n-samples": {"reverse": {"original": 512, "effective": 32}},
}
"""As lm-eval 0.4.13 writes them."""


@pytest.fixture(scope="module")
def outcomes(saved):
    found = evaluate(saved("llama", "w4a16"), TEXT, source=saved("llama"))
    return found.rows[0].outcome, found.source.outcome


def test_an_engine_that_says_the_same_has_no_gap(outcomes):
    ours, source = outcomes
    run = EngineRun(engine="vLLM", device="cpu", tokens=ours.tokens)
    row = engine_row("w4a16", run, TEXT, ours, source)
    assert (row.gap, row.gap_median, row.accuracy) == (0.0, 0.0, None)
    assert row.perplexity == pytest.approx(ours.measures.perplexity, rel=1e-12)
    assert row.agreement == ours.measures.agreement < 1
    assert row.tokens == TEXT.tokens


def test_an_engine_that_says_something_else_shows_it(outcomes):
    ours, source = outcomes
    shifted = {place: (logprob - 0.25, best) for place, (logprob, best) in ours.tokens.items()}
    run = EngineRun(engine="vLLM", device="cpu", tokens=shifted)
    row = engine_row("w4a16", run, TEXT, ours, source)
    assert row.gap == pytest.approx(0.25)
    assert row.perplexity == pytest.approx(ours.measures.perplexity * 2.718281828**0.25)


def test_answers_are_counted_in_the_engine_too(outcomes):
    ours, source = outcomes
    asked = Text(tuple(Line(each.token_ids, answer=10) for each in TEXT.lines), "test")
    right = {
        (number, at): (0.0, line.token_ids[at + 1])
        for number, line in enumerate(asked.lines)
        for at in range(len(line.token_ids) - 1)
    }
    wrong = right | {(1, 3): (0.0, 0), (2, 15): (0.0, 0)}  # before and within an answer
    for tokens, share in ((right, 1.0), (wrong, 2 / 3)):
        run = EngineRun(engine="vLLM", device="cpu", tokens=tokens)
        row = engine_row("w4a16", run, asked, ours, source)
        assert row.accuracy == share
        failures = list(Thresholds(min_accuracy=0.9).engine_failures(row, _row(ours)))
        assert len(failures) == (share < 0.9)


def _row(outcome):
    from ckptq.evaluate.result import Row

    return Row(weights="w", kv_cache="bf16", scales="-", nbytes=1, outcome=outcome)


def test_an_interpreter_without_vllm_says_so(saved):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("this interpreter has vLLM")
    with pytest.raises(MachineError, match="No module named 'vllm'"):
        in_vllm(Path(sys.executable), saved("llama"), TEXT)
    with pytest.raises(MachineError, match="cannot be run"):
        in_vllm(Path("/no/such/python"), saved("llama"), TEXT)


def test_of_many_errors_the_first_is_the_cause():
    log = """\
(Worker_TP0 pid=1) ERROR 11-21 05:38:19 [multiproc_executor.py:953]     raise ValueError(f"x")
(Worker_TP0 pid=1) ERROR 11-21 05:38:19 [multiproc_executor.py:953] ValueError: No backend: NONE
(EngineCore pid=2) ERROR 11-21 05:38:20 [core.py:1] Exception: WorkerProc failed, see stack trace"""
    last = "Traceback:\n  raise RuntimeError(\nRuntimeError: Engine core initialization failed"
    assert last_words(log, last) == "ValueError: No backend: NONE"
    assert last_words("", last) == "RuntimeError: Engine core initialization failed"
    assert last_words("", "[rank0]: torch.cuda.OutOfMemoryError: 1 GB") == (
        "torch.cuda.OutOfMemoryError: 1 GB"
    )
    assert last_words("", "killed\n") == "killed"


def test_caches_on_a_cpu_have_one_scale_and_leave_q_alone(saved):
    per_head = declared_cache(saved("llama", "kv-fp8-per-head"))
    heads = heads_with_scales(per_head)
    assert heads == saved("llama").text_config["num_key_value_heads"] > 1
    shared = EngineRun(engine="vLLM", device="cpu", tokens={}).holds(per_head)
    assert (shared.mode, shared.query, shared.scales) == ("fp8-per-tensor", False, per_head.scales)
    apart = EngineRun(engine="vLLM", device="cpu", tokens={}, ranks=heads).holds(per_head)
    assert (apart.mode, apart.query, apart.scales) == ("fp8-per-head", False, per_head.scales)
    assert EngineRun(engine="vLLM", device="cuda", tokens={}).holds(per_head) is per_head
    plain = declared_cache(saved("llama", "w4a16"))
    assert heads_with_scales(plain) is None
    assert EngineRun(engine="vLLM", device="cpu", tokens={}).holds(plain) is plain


def test_a_cpu_gets_a_process_for_each_scale_as_far_as_cores_go(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # taken back afterwards
    assert ranks_for(4, "cpu") == 4
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert [ranks_for(8, "cpu"), ranks_for(None, "cpu"), ranks_for(4, "cuda")] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(VLLM_PYTHON is None, reason="VLLM_PYTHON names no Python that has vLLM")
@pytest.mark.parametrize("scheme", ["w4a16", "kv-fp8-per-tensor", "kv-fp8-per-head"])
def test_vllm_sees_what_ckptq_computes(saved, scheme):
    found = evaluate(
        saved("llama", scheme), TEXT, source=saved("llama"), vllm_python=Path(VLLM_PYTHON)
    )
    floor, row = found.engines
    assert floor.gap < 0.1
    assert row.gap < 2 * floor.gap + 0.05


def test_lm_eval_is_asked_by_its_own_command():
    asked = Benchmarks(names=("arc_easy", "reverse"), folder=Path("tasks"), limit=8, device="cpu")
    words = command(Path("/ckpt"), asked, Path("/out"))
    assert words[:4] == [sys.executable, "-m", "lm_eval", "run"]
    given = dict(zip(words[4::2], words[5::2], strict=True))
    assert given == {
        "--model": "hf",
        "--tasks": "arc_easy,reverse",
        "--model_args": "pretrained=/ckpt,dtype=auto",
        "--output_path": "/out",
        "--batch_size": "1",
        "--device": "cpu",
        "--include_path": str(Path("tasks").resolve()),
        "--limit": "8",
    }
    words = command(Path("/ckpt"), replace(asked, vllm_python=Path("/vllm/python")), Path("/out"))
    assert words[0] == "/vllm/python"
    assert "--device" not in words
    assert words[words.index("--model") + 1] == "vllm"
    words = command(Path("/ckpt"), replace(asked, ranks=2), Path("/out"))
    assert words[words.index("--model_args") + 1].endswith(",tensor_parallel_size=2")


def test_numbers_are_read_out_of_lm_eval_s_results():
    found = scores(json.loads(json.dumps(RESULTS)), "transformers")
    assert [(s.metric, s.value, s.stderr, s.samples) for s in found] == [
        ("exact_match", 0.75, 0.01, 32),
        ("exact_match,flexible", 0.875, None, 32),
    ]
    failures = list(Thresholds(min_accuracy=0.8).benchmark_failures(found))
    assert failures == ["reverse in transformers: exact_match is 0.75, expected at least 0.8"]


def test_without_lm_eval_it_is_said_what_to_install(saved):
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("this interpreter has lm-eval")
    with pytest.raises(UsageError, match=r"pip install 'ckptq\[eval\]'"):
        run_benchmarks(saved("llama").path, Benchmarks(names=("arc_easy",)))
    asked = Benchmarks(names=("arc_easy",), vllm_python=Path(sys.executable))
    with pytest.raises(UsageError, match="-m pip install lm-eval"):
        run_benchmarks(saved("llama").path, asked)
