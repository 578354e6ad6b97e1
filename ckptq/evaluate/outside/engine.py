"""The same tokens in a real vLLM, in another interpreter: does it agree with ckptq?"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import MachineError
from ckptq.evaluate.caches.kv_cache import PER_HEAD, KVCache, declared_cache, on_cpu
from ckptq.evaluate.compare import Outcome, Tokens
from ckptq.evaluate.outside.interpreter import run_python
from ckptq.evaluate.scores import share
from ckptq.evaluate.text import Text

WORKER = Path(__file__).with_name("vllm_worker.py")
TIMEOUT = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRow:
    """One checkpoint in vLLM, beside ckptq's own forward of it."""

    weights: str
    engine: str
    tokens: int
    perplexity: float
    perplexity_here: float
    """In ckptq's own forward, with the cache as the engine stores it."""
    agreement: float
    """Share of tokens for which it and the source (in ckptq) have the same most likely token."""
    accuracy: float | None
    gap: float
    """Mean of |log-probability in vLLM - in ckptq| of the tokens of the text, in nats."""
    gap_median: float
    ranks: int = 1
    """Processes that the engine ran in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRun:
    """A checkpoint's results in vLLM."""

    engine: str
    device: str
    tokens: Tokens
    ranks: int = 1
    """Processes that share the heads."""

    def holds(self, cache: KVCache) -> KVCache:
        """The cache as vLLM stores it: on a CPU, one scale per process, and q in 16 bits."""
        if self.device != "cpu":
            return cache
        return on_cpu(cache, heads_apart=self.ranks == heads_with_scales(cache))


def in_vllm(python: Path, ckpt: Checkpoint, text: Text, timeout: float = TIMEOUT) -> EngineRun:
    """Log-probabilities of every token of the text but the first of a line.

    Environment variables are passed on, except PYTHONPATH. MachineError with vLLM's own error
    if it does not start, or fails.
    """
    with tempfile.TemporaryDirectory(prefix="ckptq-") as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        lines = [list(line.token_ids) for line in text.lines]
        task = {
            "model": str(ckpt.path.resolve()),
            "lines": lines,
            "kv_heads": heads_with_scales(declared_cache(ckpt)),
            "arguments": _arguments(ckpt),
        }
        job.write_text(json.dumps(task))
        run_python([str(python), str(WORKER), str(job), str(result)], timeout=timeout)
        if not result.is_file():
            raise MachineError(
                f"{python}: ended without a result of {WORKER.name} for {ckpt.path}; wanted a "
                "Python with vLLM"
            )
        found = json.loads(result.read_text())
    tokens = {
        (number, at): (float(logprob), int(best))
        for number, line in enumerate(found["lines"])
        for at, (logprob, best) in enumerate(line)
    }
    device, ranks = found["device"], found["ranks"]
    engine = f"vLLM {found['vllm']} on {device}"
    engine += f", {ranks} ranks" if ranks > 1 else ""
    return EngineRun(engine=engine, device=device, tokens=tokens, ranks=ranks)


def heads_with_scales(cache: KVCache) -> int | None:
    """Number of KV heads, if each has its own static scale and every layer has the same number."""
    if cache.mode != PER_HEAD or cache.scales is None:
        return None
    counts = {scales["k"].numel() for scales in cache.scales.values() if "k" in scales}
    return counts.pop() if len(counts) == 1 else None


def engine_row(
    weights: str, run: EngineRun, text: Text, ours: Outcome, source: Outcome
) -> EngineRow:
    """The measures from vLLM's log-probabilities, on the scored tokens."""
    found = run.tokens
    gaps = sorted(abs(found[place][0] - ours.tokens[place][0]) for place in ours.tokens)
    losses = [-found[place][0] for place in ours.tokens]
    agree = [found[place][1] == source.tokens[place][1] for place in ours.tokens]
    questions = {
        number: all(
            found[number, at - 1][1] == line.token_ids[at]
            for at in range(line.answer, len(line.token_ids))
        )
        for number, line in enumerate(text.lines)
        if line.answer is not None
    }
    return EngineRow(
        weights=weights,
        engine=run.engine,
        tokens=len(losses),
        perplexity=math.exp(sum(losses) / len(losses)),
        perplexity_here=ours.measures.perplexity,
        agreement=sum(agree) / len(agree),
        accuracy=share(questions),
        gap=sum(gaps) / len(gaps),
        gap_median=gaps[len(gaps) // 2],
        ranks=run.ranks,
    )


def _arguments(ckpt: Checkpoint) -> Mapping[str, Any]:
    """No images: only text is compared, and a tower that may be called needs a processor."""
    return {"limit_mm_per_prompt": {"image": 0}} if "vision_config" in ckpt.config else {}
