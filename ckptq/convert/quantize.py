"""`ckptq quantize` as a request and one call: the Python entry point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ckptq.calibrate.rehearsal import rehearse
from ckptq.calibrate.request import NO_DATA, CalibrationRequest, ScalesSource, scales_source
from ckptq.checkpoint.beside import told_of
from ckptq.checkpoint.journal import begun_source
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.checkpoint.partial import partial_of
from ckptq.convert.handover import check_handed_over, write_handed_over
from ckptq.convert.output import DEFAULTS, RunOptions
from ckptq.convert.run import Result, default_output, scale_tensors, write_quantized
from ckptq.device import find_device
from ckptq.distributed.ranks import Ranks, together
from ckptq.errors import UsageError
from ckptq.models.modules import read_layout
from ckptq.models.unserved import unseen_by_engine
from ckptq.models.unsound import refuse_unsound
from ckptq.plan.doubts import transformers_doubts, vllm_doubts
from ckptq.plan.left import left_alone
from ckptq.plan.make import RopeChoice, make_plan
from ckptq.plan.shards import SHARD_BYTES
from ckptq.plan.unit import Plan
from ckptq.progress import Begin, Note, silent, untold
from ckptq.recipes.scheme import DEQUANTIZE, Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeRequest:
    """A conversion, from the model's name to where the result goes."""

    model: str | Path
    recipe: Recipe
    revision: str | None = None
    out: Path | None = None
    """Default: the model's name and the recipe's, in the current folder."""
    ignore: tuple[str, ...] = ()
    scales: Path | None = None
    """A scales file; None calibrates if the recipe needs scales."""
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    shard_bytes: int = SHARD_BYTES
    rope_order: RopeChoice = "keep"
    stream: bool = False
    """Read the shards of a hub id by ranges, in one pass, and keep none of them."""
    as_written: bool = False
    """Keep to the recipe where vLLM cannot permute (Llama-4's q/k/v) or merge blocks of rows."""
    options: RunOptions = DEFAULTS

    def arguments(self) -> dict[str, object]:
        """What the output depends on beyond source, recipe and scales, as JSON data."""
        return {
            "ignore": list(self.ignore),
            "shard_bytes": self.shard_bytes,
            "rope_order": self.rope_order,
            "as_written": self.as_written,
        }


def plan_of(request: QuantizeRequest, note: Note = untold) -> Plan:
    """What the conversion would do: `--dry-run`. Reads headers only."""
    ckpt, plan = _opened(request)
    for line in _told_before(ckpt, plan):
        note(line)
    return plan


def _opened(request: QuantizeRequest) -> tuple[Checkpoint, Plan]:
    """The model and the plan of its conversion.

    If the plan needs calibration, it is rehearsed, so that failures show up here.
    """
    if request.recipe.handed_over:
        raise UsageError(
            f"recipe {request.recipe.name!r}: {request.recipe.handed_over[0]} runs in "
            "llm-compressor, which has no plan to show"
        )
    ckpt = open_checkpoint(request.model, _revision(request), stream=request.stream)
    plan = make_plan(
        ckpt,
        request.recipe,
        ignore=request.ignore,
        shard_bytes=request.shard_bytes,
        permutable=not request.as_written,
        rope_order=request.rope_order,
    )
    refuse_unsound(ckpt, plan.layout)
    option = next(iter(_given(request)), None)
    if option is not None and request.scales is None and plan.calibrated:
        raise UsageError(
            f"scheme {request.recipe.name!r} runs the model, and {option} reads each weight once: "
            f"pass the file of `ckptq calibrate` with --scales, or drop {option}"
        )
    if request.recipe.tuning is not None and request.calibration.batch_size != 1:
        raise UsageError(
            f"recipe {request.recipe.name!r}: AutoRound makes batches of its own, as large as the "
            "recipe says; leave --batch-size out"
        )
    if request.scales is None and plan.calibrated:
        find_device(request.options.device)
        rehearse(ckpt, plan, request.calibration.trust_remote_code)
    return ckpt, plan


def _given(request: QuantizeRequest) -> list[str]:
    """Of the options with which nothing is calibrated here, those that are given."""
    given = {
        "--stream": request.stream,
        "--part": request.options.part is not None,
        "--join": request.options.join,
    }
    return [option for option in given if given[option]]


def _revision(request: QuantizeRequest) -> str | None:
    """What was asked for; else the commit that an interrupted run on this output has begun with,
    because the branch may have moved since."""
    if request.revision is not None or not request.stream or request.options.restart:
        return request.revision
    name = str(request.model)
    source = begun_source(partial_of(request.out or default_output(name, request.recipe)))
    return source.get("revision") if source.get("name") == name else None


def _told_before(ckpt: Checkpoint, plan: Plan) -> Iterator[str]:
    """Warnings before the work: files that are not copied, Linears that stay unquantized, and what
    engines will not load."""
    yield from told_of(ckpt.path, ckpt.beside())
    if plan.recipe.conversion != DEQUANTIZE:
        yield from left_alone(plan.layout, plan.quantized)
    doubts = (*vllm_doubts(plan), *transformers_doubts(plan))
    for line in (*doubts, *unseen_by_engine(plan.layout.witnesses)):
        yield f"{plan.recipe.name}: {line}"


def quantize(request: QuantizeRequest, begin: Begin = silent, note: Note = untold) -> Result:
    """Quantize a model as the request says. `note` receives messages for the user."""
    if request.options.push is not None and request.options.part is not None:
        raise UsageError("--part is not uploaded; pass --push with --join")
    with together() as ranks:
        ranks.agreed(lambda: _check_divisible(request, ranks))
        if request.recipe.handed_over:
            return _handed_over(request, begin, note)
        return _quantize(request, ranks, begin, note)


def _quantize(request: QuantizeRequest, ranks: Ranks, begin: Begin, note: Note) -> Result:
    ckpt, plan = ranks.agreed(lambda: _opened(request))
    source = ranks.agreed(lambda: _scales(request, ckpt, plan, ranks, begin, note))
    if source is not None and source.doubt is not None:
        note(source.doubt)
    for line in (*_told_before(ckpt, plan), *(f"{plan.recipe.name}: {t}" for t in plan.told)):
        note(line)
    return write_quantized(
        ckpt,
        plan,
        request.out or default_output(ckpt.name, request.recipe),
        arguments=request.arguments(),
        scales=source,
        options=request.options,
        ranks=ranks,
        begin=begin,
        note=note,
    )


def _check_divisible(request: QuantizeRequest, ranks: Ranks) -> None:
    """UsageError for what several processes cannot divide."""
    recipe = request.recipe
    if ranks.world == 1:
        return
    given = [*_given(request), *(["--push"] if request.options.push is not None else [])]
    if given:
        raise UsageError(f"{given[0]} is for single processes; start them without torchrun")
    if recipe.handed_over:
        raise UsageError(
            f"recipe {recipe.name!r}: {recipe.handed_over[0]} runs in llm-compressor, in one "
            "process; run it without torchrun"
        )
    if recipe.tuning is not None:
        raise UsageError(
            f"recipe {recipe.name!r}: AutoRound tunes a layer as a whole, in one process; run it "
            "without torchrun"
        )


def _scales(
    request: QuantizeRequest,
    ckpt: Checkpoint,
    plan: Plan,
    ranks: Ranks,
    begin: Begin,
    note: Note,
) -> ScalesSource | None:
    device, file = request.options.device, request.scales
    source = scales_source(ckpt, plan, request.calibration, file, device, begin, note, ranks)
    if source is not None and file is not None:
        _check_fit(plan, file, source)
    return source


def _check_fit(plan: Plan, file: Path, source: ScalesSource) -> None:
    """UsageError before the run if a file's scales do not match the plan."""
    try:
        scale_tensors(plan, source.load(file.parent))
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _handed_over(request: QuantizeRequest, begin: Begin, note: Note) -> Result:
    if request.rope_order != "keep":
        raise UsageError(
            f"recipe {request.recipe.name!r} runs in llm-compressor, in the source's RoPE order; "
            "run `ckptq permute` on its result"
        )
    unsupported = {
        "--stream": request.stream,
        "--part": request.options.part is not None,
        "--join": request.options.join,
        "--push": request.options.push,
        "--ignore": request.ignore,
        "--scales": request.scales,
        "--as-written": request.as_written,
        "--max-ram": request.options.max_ram,
        "--batch-size": request.calibration.batch_size != 1,
        "--device": request.options.device,
    }
    for option, given in unsupported.items():
        if given:
            raise UsageError(
                f"recipe {request.recipe.name!r} runs in llm-compressor exactly as written, with "
                f"the whole model in memory; it does not support {option}"
            )
    ckpt = open_checkpoint(request.model, request.revision)
    check_handed_over(request.recipe)
    refuse_unsound(ckpt, read_layout(ckpt))
    for line in told_of(ckpt.path, ckpt.beside()):
        note(line)
    if request.calibration.data is None:
        note(NO_DATA)
    return write_handed_over(
        ckpt,
        request.recipe,
        request.out or default_output(ckpt.name, request.recipe),
        request.calibration,
        arguments={**request.arguments(), **request.calibration.arguments()},
        shard_bytes=request.shard_bytes,
        options=request.options,
        begin=begin,
        note=note,
    )
