"""`ckptq permute`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptq.cli.options import (
    Json,
    Model,
    Restart,
    Revision,
    Workers,
    one_of,
    words,
)
from ckptq.interrupts import ignore_signals
from ckptq.show import console


def permute(
    path: Model,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="half-split or interleaved.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Only these parts: weights, scales, zero-points; A,B.")
    ] = None,
    revision: Revision = None,
    workers: Workers = None,
    restart: Restart = False,
    json: Json = False,
) -> None:
    """Store q/k, and all tensors indexed by their rows, in another RoPE order, and mark it."""
    from ckptq.convert.output import RunOptions
    from ckptq.convert.permute import PermuteRequest
    from ckptq.convert.permute import permute as run
    from ckptq.permute.effect import Part
    from ckptq.rope_order import RopeOrder
    from ckptq.show.results import show_permuted

    request = PermuteRequest(
        model=path,
        out=output,
        to=RopeOrder(one_of("--to", to, tuple(RopeOrder))),
        only=[Part(one_of("--only", part, tuple(Part))) for part in words(only) or Part],
        revision=revision,
        options=RunOptions(workers=workers, restart=restart),
    )
    with console.progress() as begin:
        done = run(request, begin, console.note)
        ignore_signals()
    show_permuted(done, json)
