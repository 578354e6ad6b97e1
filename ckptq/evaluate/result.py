"""The results of an evaluation, and whether they are good enough."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from ckptq.errors import UsageError
from ckptq.evaluate.compare import Outcome
from ckptq.evaluate.outside.engine import EngineRow
from ckptq.evaluate.outside.harness import TaskScore
from ckptq.evaluate.scores import Measures

ACCURACIES = ("acc", "exact_match")
"""Prefixes of lm-eval's metrics that are shares of right answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to run the model, beside its source."""

    weights: str
    """A checkpoint or a scheme."""
    kv_cache: str
    scales: str
    """Where the cache's scales come from."""
    nbytes: int
    cache_bits: float = 16.0
    """Per cached value, scales included."""
    snr_db: float | None = None
    """Of all quantized weights together, in dB; None if they were not quantized here."""
    outcome: Outcome

    @property
    def measures(self) -> Measures:
        return self.outcome.measures

    @property
    def notes(self) -> tuple[str, ...]:
        """What was simulated although the device computes as an engine does, and why."""
        return self.outcome.notes

    @property
    def label(self) -> str:
        return f"{self.weights}, {self.kv_cache} cache"

    def to_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "kv_cache": self.kv_cache,
            "scales": self.scales,
            "bytes": self.nbytes,
            "cache_bits": self.cache_bits,
            "snr_db": self.snr_db,
            **asdict(self.measures),
            "layers": list(self.outcome.layers),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRow:
    """A row that ended early; the others did not."""

    weights: str
    kv_cache: str
    error: str

    def __str__(self) -> str:
        return f"{self.weights}, {self.kv_cache} cache: not measured: {self.error}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Limits; None means no limit."""

    max_kl: float | None = None
    min_agreement: float | None = None
    max_ppl_ratio: float | None = None
    min_accuracy: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is any limit."""
        return any(limit is not None for limit in astuple(self))

    def check(self) -> None:
        """UsageError for a limit that is not a number, or out of range."""
        for name, limit in asdict(self).items():
            option = f"--{name.replace('_', '-')}"
            share = name.startswith("min_")
            if limit is not None and not 0 <= limit <= (1 if share else sys.float_info.max):
                wanted = "a share, from 0 to 1" if share else "a number from 0 on"
                raise UsageError(f"{option} {limit:g}: expected {wanted}")

    def failures(self, row: Row, source: Row) -> Iterator[str]:
        """A line for each number beyond its limit; NaN always is."""
        yield from _above(row.label, "KL divergence", row.measures.kl, self.max_kl)
        yield from self._common(row.label, row.measures, source)

    def engine_failures(self, row: EngineRow, source: Row) -> Iterator[str]:
        """The same for a run in an engine, which has no KL."""
        yield from self._common(f"{row.weights} in {row.engine}", row, source)

    def benchmark_failures(self, scores: Sequence[TaskScore]) -> Iterator[str]:
        """The same for benchmarks, by their metrics of right answers."""
        for score in scores:
            if score.metric.startswith(ACCURACIES):
                label = f"{score.task} in {score.engine}"
                yield from _below(label, score.metric, score.value, self.min_accuracy)

    def _common(self, label: str, found: Measures | EngineRow, source: Row) -> Iterator[str]:
        ratio = found.perplexity / source.measures.perplexity
        accuracy = math.nan if found.accuracy is None else found.accuracy
        yield from _below(label, "top-1 agreement", found.agreement, self.min_agreement)
        yield from _above(label, "perplexity ratio", ratio, self.max_ppl_ratio)
        yield from _below(label, "accuracy", accuracy, self.min_accuracy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """All rows, with their zero and their control."""

    source: Row
    rows: tuple[Row, ...]
    failed: tuple[FailedRow, ...] = ()
    zero: Row
    """The source against itself."""
    control: Row
    """The first row (the source if the rows are schemes) with one layer spoiled."""
    text: str
    samples: int
    engines: tuple[EngineRow, ...] = ()
    """The source, then the checkpoint, in vLLM; empty if not requested."""
    benchmarks: tuple[TaskScore, ...] = ()
    """The checkpoint in lm-eval's tasks; empty if not requested."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    seconds: float = 0.0

    @property
    def failures(self) -> tuple[str, ...]:
        """A line for each row that failed, and for each number beyond its limit."""
        found = [f for row in self.rows for f in self.thresholds.failures(row, self.source)]
        for row in self.engines[1:]:
            found += self.thresholds.engine_failures(row, self.source)
        found += self.thresholds.benchmark_failures(self.benchmarks)
        return (*map(str, self.failed), *self._not_zero(), *found)

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the numbers unreliable."""
        best = min(row.measures.kl for row in self.rows)
        if self.control.measures.kl > 2 * best:
            return ()
        return (
            "the control, a model with one layer's weights out of place, has KL "
            f"{self.control.measures.kl:.4g}, not clearly worse than {best:.4g}: the rows are as "
            "bad as a broken model, or this text does not tell them apart",
        )

    @property
    def recommended(self) -> Row | None:
        """The smallest row within the thresholds; of equals, the one with the smallest cache, then
        the one nearest to the source."""
        good = [r for r in self.rows if not any(self.thresholds.failures(r, self.source))]
        return min(good, key=lambda r: (r.nbytes, r.cache_bits, r.measures.kl), default=None)

    def _not_zero(self) -> Iterator[str]:
        found = self.zero.measures
        exact = (found.kl, found.kl_reverse, *self.zero.outcome.layers, 1 - found.agreement)
        if any(exact):
            yield (
                "the source against itself is not zero "
                f"(KL {found.kl:.4g}, agreement {found.agreement:.4%}): this machine does not "
                "compute the same twice, or a weight changed on disk meanwhile"
            )

    def to_dict(self) -> dict[str, Any]:
        return _finite(
            {
                "ok": self.ok,
                "failures": list(self.failures),
                "warnings": list(self.warnings),
                "text": self.text,
                "samples": self.samples,
                "source": self.source.to_dict(),
                "rows": [row.to_dict() for row in self.rows],
                "failed": [asdict(row) for row in self.failed],
                "zero": self.zero.to_dict(),
                "control": self.control.to_dict(),
                "engines": [asdict(row) for row in self.engines],
                "benchmarks": [asdict(score) for score in self.benchmarks],
                "thresholds": asdict(self.thresholds),
                "seconds": self.seconds,
            }
        )


def _above(label: str, name: str, value: float, limit: float | None) -> Iterator[str]:
    if limit is not None and not value <= limit:
        yield f"{label}: {name} is {value:.4g}, expected at most {limit:g}"


def _below(label: str, name: str, value: float, limit: float | None) -> Iterator[str]:
    if limit is not None and not value >= limit:
        yield f"{label}: {name} is {value:.4g}, expected at least {limit:g}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
