"""The tables of docs/evaluate.md, on models that examples/make_checkpoint.py has trained.

    python benchmarks/bench_evaluate.py schemes MODEL ...
    python benchmarks/bench_evaluate.py caches MODEL ...
    python benchmarks/bench_evaluate.py engine MODEL:SCHEME,... ... --vllm-python PYTHON

A folder that examples/even_heads.py has made is a MODEL too. `--questions N` asks only so many.
With `--data FILE`, a text, models need no task: perplexity takes the place of exact match. So the
real model is measured:

    python benchmarks/bench_evaluate.py schemes real/smollm2 --data real/held-out.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from measure import machine
from record import Row as Figures
from record import add_option, publish

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.evaluate.outside.engine import EngineRow
from ckptq.evaluate.request import EvaluationRequest, evaluate_request
from ckptq.evaluate.result import Evaluation, Row
from ckptq.recipes.load import built_in, load_scheme

CODE = ("ckptq/evaluate", "ckptq/forward", "ckptq/quantize")
LINE = 19
"""Tokens of one line of the task: lines that are joined are nothing that the models know."""
CACHES = (
    *("bf16", "fp8-per-head", "fp8-per-tensor", "fp8-scale-1"),
    *("int8-per-token-head", "fp8-per-token-head"),
    *("int4-per-token-head", "int4-per-token-head-unrotated"),
    *("int2-per-token-head", "int2-per-token-head-unrotated"),
)
CONTROL = "control: a layer spoiled"
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


def schemes(models: Sequence[str], asked: argparse.Namespace) -> Iterator[Figures]:
    names = asked.schemes or [name for name in built_in() if not name.startswith(CACHE_ONLY)]
    found = [measured(Path(m), asked, schemes=names) for m in models]
    yield {"scheme": "none: the source", "size": 100, **_of_all(found, [e.source for e in found])}
    for rows in zip(*(each.rows for each in found), strict=True):
        size = 100 * rows[0].nbytes / found[0].source.nbytes
        weights = {"scheme": rows[0].weights, "size": size, "dB": rows[0].snr_db or 0}
        yield {**weights, **_of_all(found, rows)}
    yield {"scheme": CONTROL, **_of_all(found, [each.control for each in found])}


def caches(models: Sequence[str], asked: argparse.Namespace) -> Iterator[Figures]:
    found = [measured(Path(m), asked, caches=CACHES) for m in models]
    for rows in zip(*(each.rows for each in found), strict=True):
        cache = {"cache": rows[0].kv_cache, "bits": rows[0].cache_bits}
        yield {**cache, **_of_all(found, rows)}
    yield {"cache": CONTROL, **_of_all(found, [each.control for each in found])}


def engine(models: Sequence[str], asked: argparse.Namespace) -> Iterator[Figures]:
    for model in models:
        folder, _, names = model.partition(":")
        for number, name in enumerate(names.split(",")):
            floor, row = _in_vllm(Path(folder), name, asked)
            if number == 0:
                yield _engine_row(f"{Path(folder).name}, bf16 (floor)", floor)
            yield _engine_row(f"{Path(folder).name}, {name}", row)


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


def _engine_row(name: str, row: EngineRow) -> Figures:
    return {
        "checkpoint": name,
        "engine": row.engine,
        "mean": row.gap,
        "median": row.gap_median,
        "perplexity, vLLM": row.perplexity,
        "perplexity, ckptq": row.perplexity_here,
        "exact, vLLM": None if row.accuracy is None else 100 * row.accuracy,
    }


def _of_all(found: Sequence[Evaluation], rows: Sequence[Row]) -> dict[str, float]:
    """KL and the second column of every model: exact match, or perplexity without a task."""
    figures = {}
    for each, row in zip(found, rows, strict=True):
        of = f"{each.source.weights}: " if len(found) > 1 else ""
        figures[f"{of}KL"] = row.measures.kl
        if row.measures.accuracy is None:
            figures[f"{of}perplexity"] = row.measures.perplexity
        else:
            figures[f"{of}exact"] = 100 * row.measures.accuracy
    return figures


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
    parser.add_argument("--name", default="evaluate", help="of the results file, with the table's")
    add_option(parser)
    asked = parser.parse_args()
    if asked.table == "engine" and asked.vllm_python is None:
        parser.error("engine wants --vllm-python")
    publish(
        f"{asked.name}-{asked.table}",
        f"`ckptq evaluate`, {asked.table}",
        list(tables[asked.table](asked.models, asked)),
        code=CODE,
        machine=", ".join([machine(), *_packages()]),
        folder=asked.record,
    )


def _packages() -> Iterator[str]:
    for name in ("torch", "transformers"):
        yield f"{name} {version(name)}"


if __name__ == "__main__":
    main()
