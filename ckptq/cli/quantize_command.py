"""`ckptq quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptq.cli.options import (
    BatchSize,
    Data,
    Device,
    GroupSize,
    Ignore,
    Json,
    MaxRam,
    Model,
    Output,
    RecipeFile,
    Restart,
    Revision,
    Samples,
    Scheme,
    Search,
    Seed,
    SeqLen,
    ShardSize,
    TrustRemoteCode,
    Workers,
    nbytes,
    one_of,
)
from ckptq.errors import UsageError
from ckptq.interrupts import ignore_signals
from ckptq.show import console


def quantize(
    model: Model,
    scheme: Scheme = None,
    recipe: RecipeFile = None,
    output: Output = None,
    revision: Revision = None,
    ignore: Ignore = None,
    group_size: GroupSize = None,
    search: Search = False,
    scales: Annotated[Path | None, typer.Option(help="Scales file from `ckptq calibrate`.")] = None,
    data: Data = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    device: Device = None,
    shard_size: ShardSize = "5GB",
    max_ram: MaxRam = None,
    workers: Workers = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Read a hub id's weights in one pass, without storing them here."
        ),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(help="Convert one of several parts, as 3/16, for a job of its own."),
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Check that all parts are there, and publish.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(help="Upload the result to this repository of the hub, as ORG/NAME."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository of --push private, if it is new.")
    ] = False,
    rope_order: Annotated[
        str,
        typer.Option(help="keep, or half-split for engines that do not permute Llama-4's q/k."),
    ] = "keep",
    as_written: Annotated[
        bool,
        typer.Option(
            "--as-written",
            help="Follow the recipe even if vLLM cannot permute (Llama-4's q/k/v) or merge blocks.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read headers only.")
    ] = False,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint into a compressed-tensors one that vLLM serves."""
    from ckptq.calibrate.request import CalibrationRequest
    from ckptq.checkpoint.hub.upload import Destination
    from ckptq.convert.division.parts import Part
    from ckptq.convert.output import RunOptions
    from ckptq.convert.quantize import QuantizeRequest, plan_of
    from ckptq.convert.quantize import quantize as convert
    from ckptq.recipes.group_size import with_group_size
    from ckptq.recipes.load import load_either
    from ckptq.recipes.searched import with_search
    from ckptq.show.results import show_part, show_plan, show_quantized

    if join and (part is not None or restart):
        raise UsageError("--join goes without --part and --restart")
    if private and push is None:
        raise UsageError("--private goes with --push")
    found = load_either(scheme, recipe)
    found = found if group_size is None else with_group_size(found, group_size)
    request = QuantizeRequest(
        model=model,
        recipe=with_search(found) if search else found,
        revision=revision,
        out=output,
        ignore=tuple(ignore or ()),
        scales=scales,
        calibration=CalibrationRequest(
            data=data,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
        ),
        shard_bytes=nbytes(shard_size),
        rope_order=one_of("--rope-order", rope_order, ("keep", "half-split")),
        stream=stream,
        as_written=as_written,
        options=RunOptions(
            workers=workers,
            max_ram=nbytes(max_ram) if max_ram else None,
            device=device,
            restart=restart,
            part=Part.parse(part) if part is not None else None,
            join=join,
            push=Destination(name=push, private=private) if push is not None else None,
        ),
    )
    if dry_run:
        show_plan(plan_of(request, console.note), json)
        return
    with console.progress() as begin:
        result = convert(request, begin, console.note)
        ignore_signals()
    if part is not None and not json:
        show_part(result, part)
    else:
        show_quantized(result, json)
