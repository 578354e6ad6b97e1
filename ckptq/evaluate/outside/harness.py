"""`--tasks`: lm-eval's benchmarks, with transformers here or with vLLM in another interpreter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptq.errors import MachineError, UsageError
from ckptq.evaluate.outside.interpreter import run_python


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One metric of one benchmark."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    engine: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmarks:
    """What to run in lm-eval."""

    names: Sequence[str]
    folder: Path | None = None
    """A folder with the user's own tasks in lm-eval's YAML; their relative paths start there."""
    limit: int | None = None
    """Questions per task; None means all."""
    batch_size: int = 1
    device: str = "cpu"
    vllm_python: Path | None = None
    """An interpreter with vLLM and lm-eval; None runs transformers in this one."""
    ranks: int = 1
    """Processes that vLLM runs in."""


def run_benchmarks(checkpoint: Path, asked: Benchmarks) -> tuple[TaskScore, ...]:
    """Every metric of every task, from lm-eval in its own process.

    UsageError if lm-eval is not installed, MachineError with its own error if it fails.
    """
    check_installed(asked)
    with tempfile.TemporaryDirectory(prefix="ckptq-") as folder:
        run_python(command(checkpoint, asked, Path(folder)), folder=asked.folder)
        files = sorted(Path(folder).rglob("results_*.json"))
        if not files:
            raise MachineError(f"lm-eval ended without results for {', '.join(asked.names)}")
        return scores(json.loads(files[-1].read_text()), _engine(asked))


def check_installed(asked: Benchmarks) -> None:
    """UsageError that says what to install, and where."""
    if asked.vllm_python is None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UsageError(
                "--tasks needs lm-eval: pip install 'ckptq[eval]'; --task FILE does not"
            )
        return
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('lm_eval') is None)"
    try:
        missing = subprocess.run([str(asked.vllm_python), "-c", probe], check=False).returncode
    except OSError as error:
        raise UsageError(f"{asked.vllm_python}: cannot be run: {error.strerror}") from error
    if missing:
        raise UsageError(
            f"--tasks with {asked.vllm_python} needs lm-eval there: "
            f"{asked.vllm_python} -m pip install lm-eval"
        )


def command(checkpoint: Path, asked: Benchmarks, out: Path) -> list[str]:
    """lm-eval's own command line; `out` is the folder for its results."""
    vllm = asked.vllm_python is not None
    # absolute, but not resolved: an environment's interpreter is a link that knows where it lies
    words = [str((asked.vllm_python or Path(sys.executable)).absolute()), "-m", "lm_eval", "run"]
    words += ["--model", "vllm" if vllm else "hf", "--tasks", ",".join(asked.names)]
    shared = f",tensor_parallel_size={asked.ranks}" if asked.ranks > 1 else ""
    words += ["--model_args", f"pretrained={checkpoint.resolve()},dtype=auto{shared}"]
    words += ["--output_path", str(out), "--batch_size", str(asked.batch_size)]
    words += [] if vllm else ["--device", asked.device]
    words += ["--include_path", str(asked.folder.resolve())] if asked.folder is not None else []
    words += ["--limit", str(asked.limit)] if asked.limit is not None else []
    return words


def scores(results: Mapping[str, Any], engine: str) -> tuple[TaskScore, ...]:
    """The numbers in lm-eval's results file, with keys like "exact_match,none"."""
    found = []
    for task, metrics in results["results"].items():
        asked = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            found.append(
                TaskScore(
                    task=task,
                    metric=metric if kind == "none" else key,
                    value=float(value),
                    stderr=error if isinstance(error, float) else None,
                    samples=asked,
                    engine=engine,
                )
            )
    return tuple(found)


def _engine(asked: Benchmarks) -> str:
    return "vLLM" if asked.vllm_python is not None else "transformers"
