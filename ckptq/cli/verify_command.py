"""`ckptq verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptq.cli.options import (
    Device,
    Json,
    Text,
    new_file,
)
from ckptq.distributed.ranks import started
from ckptq.show import console


def verify(
    path: Annotated[str, typer.Argument(help="The quantized checkpoint.")],
    source: Annotated[
        str | None, typer.Option(help="The unquantized checkpoint it was made from.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Compare sampled rows only.")] = False,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Check the structure only: a second for 100 GB.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="Also check loading in this engine: transformers, vllm."),
    ] = None,
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="A Python with vLLM, which then loads names and shapes."),
    ] = None,
    attention: Annotated[
        bool,
        typer.Option("--attention", help="Run text and measure q, k and v in FP8."),
    ] = False,
    data: Text = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Number of text samples; default: as many as needed.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Maximum tokens per sample.")] = None,
    device: Device = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report as a self-contained page.")
    ] = None,
    json: Json = False,
) -> None:
    """Prove that a checkpoint is right, or report what is wrong and how to fix it (exit code 1)."""
    from ckptq.show.verification import show_report
    from ckptq.show.verify_page import write_html_report
    from ckptq.verify.run import verify as check

    if html is not None:
        new_file("--html", html)
    with console.progress() as begin:
        found = check(
            path,
            source,
            fast=fast,
            headers_only=headers_only,
            engine=engine,
            vllm_python=vllm_python,
            attention=attention,
            text=data,
            samples=samples,
            seq_len=seq_len,
            device=device,
            begin=begin,
        )
    show_report(found, json)
    if html is not None and started().leads:
        write_html_report(html, found)
    if not found.ok:
        raise typer.Exit(1)
