"""`ckptq calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptq.cli.options import (
    BatchSize,
    Data,
    Device,
    Json,
    Model,
    RecipeFile,
    Restart,
    Revision,
    Samples,
    Seed,
    SeqLen,
    TrustRemoteCode,
    new_file,
)
from ckptq.interrupts import ignore_signals
from ckptq.show import console


def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The scales file to write.")],
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", "-s", help="Scheme to calibrate for; default: fp8-per-head."),
    ] = None,
    recipe: RecipeFile = None,
    revision: Revision = None,
    data: Data = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    device: Device = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Run the model layer by layer over text and write its attention scales to a small file.

    On several GPUs: torchrun --nproc-per-node 4 -m ckptq calibrate ...
    """
    from ckptq.calibrate.request import CalibrationRequest
    from ckptq.calibrate.to_file import ScalesRequest, calibrate_to_file
    from ckptq.recipes.load import load_either
    from ckptq.show.results import show_scales

    request = ScalesRequest(
        model=model,
        recipe=load_either(scheme or (None if recipe else "fp8-per-head"), recipe),
        output=output,
        revision=revision,
        text=CalibrationRequest(
            data=data,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
        ),
        device=device,
        restart=restart,
    )
    new_file("--output", output)
    with console.progress() as begin:
        made = calibrate_to_file(request, begin, console.note)
        ignore_signals()
    show_scales(output, made, json)
