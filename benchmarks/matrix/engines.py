"""What vLLM and transformers answer for a checkpoint, asked once and kept in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from reasons import reason

HERE = Path(__file__).resolve().parent

LIKELIEST = 20
"""Tokens that a difference is taken over."""

Answer = dict[str, Any]
"""A result of `vllm_worker.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Token ids, how many tokens are wanted after each, and how many candidates for the first."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    top: int

    def job(self, folder: Path) -> dict[str, Any]:
        return {
            "checkpoint": str(folder),
            "prompts": self.prompts,
            "max_tokens": self.max_tokens,
            "top": self.top,
        }


class Engines:
    """Answers to one set of questions, by engine: "vllm", "stand-ins" or "transformers"."""

    def __init__(
        self,
        file: Path,
        questions: Questions,
        vllm: str | None,
        stand_ins: Path | None,
        gpu_workers: int = 0,
    ):
        """`file` keeps the answers; `vllm` is an interpreter that has vLLM, None leaves it out.

        `gpu_workers` processes share a GPU for vLLM; 0 is one on the CPU.
        """
        self.file, self.questions = file, questions
        self.workers = {"vllm": max(gpu_workers, 1)}
        self.commands = {"transformers": [sys.executable, str(HERE / "transformers_worker.py")]}
        if vllm:
            self.commands["vllm"] = [vllm, str(HERE / "vllm_worker.py")]
            self.commands["vllm"] += ["--gpu"] if gpu_workers else []
            if stand_ins:
                option = ["--stand-ins", str(stand_ins.resolve())]
                self.commands["stand-ins"] = [*self.commands["vllm"], *option]
        self.found: dict[tuple[str, str], Answer] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                answer = json.loads(line)
                self.found[answer["engine"], answer["checkpoint"]] = answer

    def ask_all(self, folders: Iterable[Path], own_kernels: bool = True) -> None:
        """Ask every engine; stand-ins where vLLM's own kernels fail, or at once without them."""
        folders = list(folders)
        self._ask("transformers", folders)
        if own_kernels or "stand-ins" not in self.commands:
            self._ask("vllm", folders)
            folders = [f for f in folders if "error" in (self.of("vllm", f) or {})]
        self._ask("stand-ins", folders)

    def of(self, engine: str, folder: Path) -> Answer | None:
        return self.found.get((engine, str(folder)))

    def in_vllm(self, folder: Path) -> tuple[Answer | None, str]:
        """vLLM's answer, and whose kernels it ran, or its error."""
        own, other = self.of("vllm", folder), self.of("stand-ins", folder)
        for answer, kernels in ((own, "own kernels"), (other, "stand-ins")):
            if answer is not None and "error" not in answer:
                return answer, kernels
        return None, said(other or own)

    def _ask(self, engine: str, folders: list[Path]) -> None:
        """A few processes for all folders that this engine has not answered for."""
        todo = [f for f in folders if self.of(engine, f) is None]
        if not todo or engine not in self.commands:
            return
        count = min(self.workers.get(engine, 1), len(todo))
        started = [self._start(engine, todo[number::count]) for number in range(count)]
        for process in started:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("RESULT "):
                    self._keep(engine, json.loads(line.removeprefix("RESULT ")))
            if process.wait() != 0:
                raise SystemExit(f"{engine}: its process ended with {process.returncode}")

    def _start(self, engine: str, folders: list[Path]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.commands[engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        jobs = (json.dumps(self.questions.job(folder)) + "\n" for folder in folders)
        process.stdin.write("".join(jobs))
        process.stdin.close()
        return process

    def _keep(self, engine: str, answer: Answer) -> None:
        answer = {"engine": engine, **answer}
        self.found[engine, answer["checkpoint"]] = answer
        with self.file.open("a") as file:
            file.write(json.dumps(answer) + "\n")
        name = Path(answer["checkpoint"]).name
        print(f"{engine}: {name}: {said(answer)}", file=sys.stderr, flush=True)


def said(answer: Answer | None) -> str:
    """ "yes", or why not."""
    if answer is None:
        return "not asked"
    if "error" not in answer:
        return "yes"
    return "no: " + reason(answer["error"], answer.get("where", ""))


def distance(one: Answer | None, other: Answer | None) -> float | None:
    """Mean |delta log probability| of the first tokens that `other` finds likeliest.

    Both answers have to cover the vocabulary: a token that one engine does not even list is the
    largest difference, not one to leave out.
    """
    if not one or not other or "error" in one or "error" in other:
        return None
    deltas = []
    for left, right in zip(one["top"], other["top"], strict=True):
        here, there = dict(map(tuple, left)), dict(map(tuple, right))
        likeliest = sorted(there, key=lambda token: -there[token])[:LIKELIEST]
        deltas += [abs(here[token] - there[token]) for token in likeliest]
    return mean(deltas)


def exact_match(answer: Answer | None, wanted: Sequence[Sequence[int]]) -> float | None:
    """Share of prompts whose greedy answer is the wanted one, token by token."""
    if not answer or "error" in answer:
        return None
    return mean(list(w) == list(g) for w, g in zip(wanted, answer["greedy"], strict=True))
