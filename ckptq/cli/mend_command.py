"""`ckptq mend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptq.cli.options import (
    Device,
    Json,
    Restart,
    Workers,
)
from ckptq.interrupts import ignore_signals
from ckptq.show import console


def mend(
    path: Annotated[str, typer.Argument(help="The quantized checkpoint.")],
    output: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    source: Annotated[
        str | None, typer.Option(help="The unquantized checkpoint it was made from.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Also repair for this engine: transformers, vllm.")
    ] = None,
    per_tensor: Annotated[
        bool,
        typer.Option(
            "--per-tensor",
            help="One cache scale per layer instead of one per head, for engines without "
            "FlashAttention 3.",
        ),
    ] = False,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Repair what headers and config show: seconds.")
    ] = False,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Repair config.json and the index only, and keep copies of them."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the repairs; write nothing.")
    ] = False,
    workers: Workers = None,
    device: Device = None,
    restart: Restart = False,
    json: Json = False,
) -> None:
    """Repair what verify finds, where there is one way to; exit code 1 if something is left."""
    from ckptq.convert.output import RunOptions
    from ckptq.mend.run import MendRequest
    from ckptq.mend.run import mend as run
    from ckptq.show.mending import show_mended

    request = MendRequest(
        path=path,
        out=output,
        source=source,
        engine=engine,
        per_tensor=per_tensor,
        headers_only=headers_only,
        in_place=in_place,
        dry_run=dry_run,
        options=RunOptions(workers=workers, device=device, restart=restart),
    )
    with console.progress() as begin:
        done = run(request, begin, console.note)
        ignore_signals()
    show_mended(done, json)
    if not done.ok:
        raise typer.Exit(1)
