"""The command line. Each command parses, makes one library call, and shows one result.

Imports stand inside the commands, so that `--help` loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptq.interrupts import ignore_signals
from ckptq.options import (
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
    Text,
    TrustRemoteCode,
    Version,
    Workers,
    nbytes,
    new_file,
    one_of,
    words,
)
from ckptq.show import console

app = typer.Typer(
    name="ckptq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def program(version: Version = False) -> None:
    """Quantize Hugging Face checkpoints for vLLM, offline, and prove that the result is right."""


@app.command()
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
    from ckptq.convert.output import RunOptions
    from ckptq.convert.quantize import QuantizeRequest, plan_of
    from ckptq.convert.quantize import quantize as convert
    from ckptq.recipes.group_size import with_group_size
    from ckptq.recipes.load import load_either
    from ckptq.recipes.searched import with_search
    from ckptq.show.results import show_plan, show_quantized

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
        as_written=as_written,
        options=RunOptions(
            workers=workers,
            max_ram=nbytes(max_ram) if max_ram else None,
            device=device,
            restart=restart,
        ),
    )
    if dry_run:
        show_plan(plan_of(request, console.note), json)
        return
    with console.progress() as begin:
        result = convert(request, begin, console.note)
        ignore_signals()
    show_quantized(result, json)


@app.command()
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
    if made is not None:
        show_scales(output, made, json)


@app.command()
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
            device=device,
            begin=begin,
        )
    if html is not None:
        write_html_report(html, found)
    show_report(found, json)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
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


@app.command()
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


@app.command()
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
    if report is not None:
        write_report(report, found, evaluation_tables(found))
    show_evaluation(found, json)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def inspect(path: Model, revision: Revision = None, json: Json = False) -> None:
    """Show what is in a checkpoint: schemes, layers, sizes, scales. Reads headers only."""
    from ckptq.inspect import inspect as look
    from ckptq.show.results import show_inspection

    found = look(path, revision)
    for line in found.not_carried:
        console.note(line)
    show_inspection(found, json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe's YAML.")] = None,
    json: Json = False,
) -> None:
    """List the built-in recipes and compressed-tensors' presets, or show one."""
    from ckptq.recipes.load import describe, load_scheme
    from ckptq.show.results import show_recipe, show_recipes

    if name is None:
        show_recipes(describe(), json)
    else:
        show_recipe(load_scheme(name), json)
