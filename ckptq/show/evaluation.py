"""An evaluation as text: the table with its zero and its control, then the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptq.printable import size
from ckptq.show import console

if TYPE_CHECKING:
    from ckptq.evaluate.outside.engine import EngineRow
    from ckptq.evaluate.outside.harness import TaskScore
    from ckptq.evaluate.result import Evaluation, Row
    from ckptq.show.evaluate_page import Table

COLUMNS = (
    *("weights", "KV cache", "bits", "its scales", "size", "dB", "KL", "KL reverse", "KL 99%"),
    *("perplexity", "agreement", "exact", "last layer"),
)

ENGINE_COLUMNS = (
    *("weights", "engine", "perplexity", "here", "agreement"),
    *("exact", "mean gap", "median gap"),
)

BENCHMARK_COLUMNS = ("task", "metric", "value", "standard error", "questions", "engine")


def show_evaluation(found: Evaluation, json: bool) -> None:
    """`evaluate`: every row beside the source, the verdict, and the recommended row."""
    if json:
        console.show_json(found)
        return
    for title, columns, rows in evaluation_tables(found):
        console.show_table(title, columns, rows)
    console.show_lines(
        "KL is of source‖row in nats per token; the last column is the relative error of the "
        "hidden states after the last layer",
        *(f"note  {warning}" for warning in found.warnings),
        *(f"note  {row.label}: {said}" for row in found.rows for said in row.notes),
        *(f"FAIL  {failure}" for failure in found.failures),
        *_verdict(found),
    )


def evaluation_tables(found: Evaluation) -> list[Table]:
    """The tables: the comparison, and the engine if requested."""
    named = [("source", found.source), ("source again", found.zero)]
    named += [(row.weights, row) for row in found.rows]
    named += [(f"{found.control.weights}, a layer spoiled", found.control)]
    title = (
        f"{found.source.weights} on {found.text}: {found.samples} samples, "
        f"{found.source.measures.tokens} tokens"
    )
    rows = [_cells(name, row) for name, row in named]
    tables: list[Table] = [(title, *_without_empty(COLUMNS, rows))]
    if found.engines:
        title = (
            "the same tokens in the engine; the gap is to ckptq's own log-probabilities, in nats"
        )
        tables.append((title, ENGINE_COLUMNS, [_engine_cells(row) for row in found.engines]))
    if found.benchmarks:
        scores = [_benchmark_cells(score) for score in found.benchmarks]
        tables.append((f"{found.rows[0].weights} in lm-eval", BENCHMARK_COLUMNS, scores))
    return tables


def _without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> tuple[list[str], list[list[object]]]:
    """Without columns that have a dash in every row."""
    kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _cells(name: str, row: Row) -> tuple[object, ...]:
    measures = row.measures
    return (
        *(name, row.kv_cache, "-" if row.kv_cache == "bf16" else f"{row.cache_bits:.3g}"),
        *(row.scales, size(row.nbytes)),
        "-" if row.snr_db is None else f"{row.snr_db:.1f}",
        *(f"{measures.kl:.5f}", f"{measures.kl_reverse:.5f}", f"{measures.kl_99:.4f}"),
        f"{measures.perplexity:.5g}",
        f"{measures.agreement:.2%}",
        "-" if measures.accuracy is None else f"{measures.accuracy:.1%}",
        f"{row.outcome.layers[-1]:.4f}" if row.outcome.layers else "-",
    )


def _engine_cells(row: EngineRow) -> tuple[object, ...]:
    return (
        *(row.weights, row.engine, f"{row.perplexity:.4f}", f"{row.perplexity_here:.4f}"),
        f"{row.agreement:.2%}",
        "-" if row.accuracy is None else f"{row.accuracy:.1%}",
        *(f"{row.gap:.5f}", f"{row.gap_median:.5f}"),
    )


def _benchmark_cells(score: TaskScore) -> tuple[object, ...]:
    error = "-" if score.stderr is None else f"{score.stderr:.4f}"
    return (
        *(score.task, score.metric, f"{score.value:.4f}", error),
        *("-" if score.samples is None else score.samples, score.engine),
    )


def _verdict(found: Evaluation) -> list[str]:
    """Nothing if there is no threshold."""
    if not found.thresholds.any:
        return []
    if len(found.rows) == 1:
        return ["good enough" if found.ok else "not good enough"]
    best = found.recommended
    if best is None:
        return ["no row is within the thresholds"]
    return [f"smallest within the thresholds: {best.label} ({size(best.nbytes)})"]
