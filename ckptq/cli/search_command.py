"""`ckptq search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptq.cli.options import (
    Device,
    Ignore,
    Json,
    Model,
    Revision,
    Samples,
    Seed,
    SeqLen,
    Text,
    nbytes,
    new_file,
    one_of,
    words,
)
from ckptq.interrupts import ignore_signals
from ckptq.show import console


def search(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")],
    bits: Annotated[
        float | None, typer.Option(help="Stored bits per weight of the Linears, on average.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of all tensors of the result, e.g. 5GB.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Smallest whose measured KL is no more, in nats; needs --data."),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(help="Smallest that answers this share of a task's questions, 0 to 1."),
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="Questions: a .jsonl of prompt and answer.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Limit the questions.")] = None,
    schemes: Annotated[
        list[str] | None,
        typer.Option(help="Choose from: A,B,C; default: nvfp4a16,fp8-dynamic,bf16."),
    ] = None,
    kv_bits: Annotated[
        float | None,
        typer.Option(help="Bits per cached value, on average over layers; needs --data."),
    ] = None,
    kv_caches: Annotated[
        list[str] | None,
        typer.Option(help="Formats for --kv-bits: A,B,C; default: all that vLLM serves."),
    ] = None,
    ignore: Ignore = None,
    revision: Revision = None,
    data: Text = None,
    samples: Samples = 16,
    seq_len: SeqLen = 512,
    seed: Seed = 0,
    per: Annotated[
        str, typer.Option(help="With --data, what is tried alone: set, or layer (faster).")
    ] = "set",
    sensitivities: Annotated[
        Path | None,
        typer.Option(help="The file that keeps them; default: beside the recipe, by its name."),
    ] = None,
    device: Device = None,
    report: Annotated[
        Path | None, typer.Option(help="Write tables and chart: .html, .svg or .png.")
    ] = None,
    json: Json = False,
) -> None:
    """Choose a scheme for every set of Linears: the least loss for a size; writes a recipe."""
    from ckptq.search.caches import CACHES
    from ckptq.search.choice import Budget
    from ckptq.search.request import SCHEMES, SearchRequest
    from ckptq.search.request import search as run
    from ckptq.show.evaluate_page import check_report
    from ckptq.show.searching import show_search, write_search_report

    new_file("--output", output)
    if report is not None:
        check_report(report, output, sensitivities)
    request = SearchRequest(
        model=model,
        budget=Budget(
            bits=bits,
            nbytes=nbytes(size) if size else None,
            max_kl=max_kl,
            min_accuracy=min_accuracy,
        ),
        output=output,
        sensitivities=sensitivities,
        revision=revision,
        schemes=words(schemes) or SCHEMES,
        ignore=tuple(ignore or ()),
        data=data,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        task=task,
        questions=questions,
        per=one_of("--per", per, ("set", "layer")),
        device=device,
        kv_bits=kv_bits,
        kv_caches=words(kv_caches) or CACHES,
    )
    with console.progress() as begin:
        found = run(request, begin, console.note)
        ignore_signals()
    show_search(found, json)
    if report is not None:
        write_search_report(report, found)
