"""The tables of docs/evaluate.md, on models that examples/make_checkpoint.py has trained.

    python benchmarks/bench_evaluate.py schemes MODEL ...
    python benchmarks/bench_evaluate.py caches MODEL ...
    python benchmarks/bench_evaluate.py engine MODEL:SCHEME,... ... --vllm-python PYTHON

A folder that examples/even_heads.py has made is a MODEL too. `--report FILE` writes the table with
the command and what it was measured on; `--questions N` asks only so many. With `--data FILE`, a
text, models need no task: perplexity takes the place of exact match. So the real model is measured:

    python benchmarks/bench_evaluate.py schemes real/smollm2 --data real/held-out.jsonl
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from measure import machine

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.evaluate.outside.engine import EngineRow
from ckptq.evaluate.request import EvaluationRequest, evaluate_request
from ckptq.evaluate.result import Evaluation, Row
from ckptq.recipes.load import built_in, load_scheme

LINE = 19
"""Tokens of one line of the task: lines that are joined are nothing that the models know."""
CACHES = (
    *("bf16", "fp8-per-head", "fp8-per-tensor", "fp8-scale-1"),
    *("int8-per-token-head", "fp8-per-token-head"),
    *("int4-per-token-head", "int4-per-token-head-unrotated"),
    *("int2-per-token-head", "int2-per-token-head-unrotated"),
)
CACHE_ONLY = "kv-"
"""Schemes that leave the weights alone: what they do is in the table of caches."""


def measured(model: Path, asked: argparse.Namespace, **compared: object) -> Evaluation:
    """All 128 lines of the text that an example came with, and its questions; or `--data`."""
    if asked.data is not None:
        text: dict[str, object] = {"data": str(asked.data), "samples": 128, "batch_size": 4}
    else:
        text = {
            "data": str(model / "calibration.txt"),
            "task": model / "task.jsonl",
            "samples": 128,
            "seq_len": LINE,
            "questions": asked.questions,
            "batch_size": 128,
        }
    return evaluate_request(model, EvaluationRequest(**text, **compared))  # type: ignore[arg-type]


def schemes(models: Sequence[str], asked: argparse.Namespace) -> Iterator[str]:
    names = asked.schemes or [name for name in built_in() if not name.startswith(CACHE_ONLY)]
    found = [measured(Path(m), asked, schemes=names) for m in models]
    yield _line("scheme", "size", "dB", *_columns(found))
    yield _rule(1, 2 + 2 * len(found))
    yield _line("none: the source", "100%", "", *(c for each in found for c in _cells(each.source)))
    for rows in zip(*(each.rows for each in found), strict=True):
        size = f"{rows[0].nbytes / found[0].source.nbytes:.0%}"
        first = (f"`{rows[0].weights}`", size, f"{rows[0].snr_db or 0:.1f}")
        yield _line(*first, *(cell for row in rows for cell in _cells(row)))
    yield _control(found, "", "")


def caches(models: Sequence[str], asked: argparse.Namespace) -> Iterator[str]:
    found = [measured(Path(m), asked, caches=CACHES) for m in models]
    yield _line("cache", "bits", *_columns(found))
    yield _rule(1, 1 + 2 * len(found))
    for rows in zip(*(each.rows for each in found), strict=True):
        first = (f"`{rows[0].kv_cache}`", f"{rows[0].cache_bits:.3g}")
        yield _line(*first, *(cell for row in rows for cell in _cells(row)))
    yield _control(found, "")


def engine(models: Sequence[str], asked: argparse.Namespace) -> Iterator[str]:
    yield _line("checkpoint", "engine", "mean", "median", "perplexity there, here", "exact there")
    yield _rule(2, 4)
    for model in models:
        folder, _, names = model.partition(":")
        for number, name in enumerate(names.split(",")):
            floor, row = _in_vllm(Path(folder), name, asked)
            if number == 0:
                yield _engine_line(f"{Path(folder).name}, bf16 (floor)", floor)
            yield _engine_line(f"{Path(folder).name}, {name}", row)


def _in_vllm(model: Path, scheme: str, asked: argparse.Namespace) -> Sequence[EngineRow]:
    text = str(model / "calibration.txt")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, scheme)
        calibration = CalibrationRequest(data=text, seq_len=LINE)
        recipe = load_scheme(scheme)
        quantize(QuantizeRequest(model=model, recipe=recipe, out=out, calibration=calibration))
        request = EvaluationRequest(
            source=str(model),
            data=text,
            task=model / "task.jsonl",
            samples=32,
            seq_len=LINE,
            questions=asked.questions or 128,
            batch_size=64,
            vllm_python=asked.vllm_python,
        )
        return evaluate_request(out, request).engines


def _engine_line(name: str, row: EngineRow) -> str:
    accuracy = "-" if row.accuracy is None else _share(row.accuracy)
    return _line(
        *(name, row.engine, f"{row.gap:.4f}", f"{row.gap_median:.5f}"),
        *(f"{row.perplexity:.4g}, {row.perplexity_here:.4g}", accuracy),
    )


def _columns(found: Sequence[Evaluation]) -> Iterator[str]:
    for each in found:
        second = "perplexity" if each.source.measures.accuracy is None else "exact"
        yield from (f"{each.source.weights}: KL", second)


def _cells(row: Row) -> tuple[str, str]:
    kl, accuracy = row.measures.kl, row.measures.accuracy
    second = f"{row.measures.perplexity:.2f}" if accuracy is None else _share(accuracy)
    return f"{kl:.5f}" if kl < 0.1 else f"{kl:.2f}", second


def _share(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _control(found: Sequence[Evaluation], *between: str) -> str:
    cells = (cell for each in found for cell in _cells(each.control))
    return _line("control: a layer spoiled", *between, *cells)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(words: int, numbers: int) -> str:
    return "|" + "---|" * words + "---:|" * numbers


def _header(table: str) -> Iterator[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    yield f"# `ckptq evaluate`, table of {table}"
    yield ""
    yield f"    python benchmarks/bench_evaluate.py {shlex.join(sys.argv[1:])}"
    yield ""
    yield f"{machine()}; {packages}."
    yield ""


def main() -> None:
    tables = {"schemes": schemes, "caches": caches, "engine": engine}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=tables)
    parser.add_argument("models", nargs="+")
    parser.add_argument(
        "--schemes", type=lambda names: names.split(","), help="instead of all built-in ones"
    )
    parser.add_argument("--questions", type=int, help="of the task, instead of all (engine: 128)")
    parser.add_argument("--data", type=Path, help="a text, for models that come without a task")
    parser.add_argument("--vllm-python", type=Path, help="a Python that has vLLM")
    parser.add_argument("--report", type=Path, help="write the table there as well")
    asked = parser.parse_args()
    if asked.table == "engine" and asked.vllm_python is None:
        parser.error("engine wants --vllm-python")
    lines = []
    for line in tables[asked.table](asked.models, asked):
        print(line, flush=True)
        lines.append(line)
    if asked.report is not None:
        asked.report.write_text("\n".join([*_header(asked.table), *lines]) + "\n")


if __name__ == "__main__":
    main()
