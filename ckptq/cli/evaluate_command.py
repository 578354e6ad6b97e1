"""`ckptq evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptq.cli.options import (
    Device,
    Json,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Text,
    words,
)
from ckptq.distributed.ranks import started
from ckptq.show import console


def evaluate(
    path: Annotated[str, typer.Argument(help="The quantized checkpoint, or a source to try.")],
    source: Annotated[
        str | None, typer.Option(help="The unquantized checkpoint it was made from.")
    ] = None,
    schemes: Annotated[
        list[str] | None,
        typer.Option(help="Try these schemes on an unquantized checkpoint: A,B,C."),
    ] = None,
    kv_cache: Annotated[
        list[str] | None,
        typer.Option(help="Try these caches: bf16, fp8-per-head, int4-per-token-head, ..."),
    ] = None,
    revision: Revision = None,
    data: Text = None,
    task: Annotated[
        Path | None, typer.Option(help="Questions: a .jsonl of prompt and answer.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Limit the questions per task.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Benchmarks of lm-eval, by name: A,B,C.")
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(help="A folder with your own lm-eval tasks.")
    ] = None,
    samples: Samples = 32,
    seq_len: SeqLen = 512,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples in one forward pass; default: 1, on a GPU as many as fill it.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    max_kl: Annotated[float | None, typer.Option(help="Fail above this mean KL, in nats.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Fail below this share of equal top tokens, 0 to 1.")
    ] = None,
    max_ppl_ratio: Annotated[
        float | None, typer.Option(help="Fail above this perplexity over the source's.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Fail below this share of right answers, 0 to 1.")
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="A Python with vLLM: run the models there as well.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write tables and charts: .html, .svg or .png.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure what quantization costs; exit code 1 if it exceeds a threshold."""
    from ckptq.evaluate.request import EvaluationRequest, evaluate_request
    from ckptq.evaluate.result import Thresholds
    from ckptq.show.evaluate_page import check_report, write_report
    from ckptq.show.evaluation import evaluation_tables, show_evaluation

    if report is not None:
        check_report(report)
    asked = EvaluationRequest(
        source=source,
        caches=words(kv_cache),
        schemes=words(schemes),
        data=data,
        task=task,
        questions=questions,
        tasks=words(tasks),
        tasks_path=tasks_path,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        device=device,
        vllm_python=vllm_python,
        thresholds=Thresholds(
            max_kl=max_kl,
            min_agreement=min_agreement,
            max_ppl_ratio=max_ppl_ratio,
            min_accuracy=min_accuracy,
        ),
    )
    with console.progress() as begin:
        found = evaluate_request(path, asked, revision=revision, begin=begin, note=console.note)
    show_evaluation(found, json)  # first: hours of work are not lost with a full disk
    if report is not None and started().leads:
        write_report(report, found, evaluation_tables(found))
    if not found.ok:
        raise typer.Exit(1)
