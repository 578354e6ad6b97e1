"""What `ckptq quantize` asks for as data, and the one call that does it: the Python entry point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptq.calibrate.ranks import started
from ckptq.calibrate.request import CalibrationRequest, ScalesSource, scales_source
from ckptq.calibrate.scales import Scales, load_scales
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.convert.handover import check_handed_over, write_handed_over
from ckptq.convert.run import Result, default_output, scale_tensors, write_quantized
from ckptq.errors import UsageError
from ckptq.permute.order import Sharing
from ckptq.plan.doubts import vllm_doubts
from ckptq.plan.make import SHARD_BYTES, RopeChoice, make_plan
from ckptq.plan.unit import Plan
from ckptq.progress import Begin, silent
from ckptq.recipes.load import Recipe

NO_DATA = (
    "calibrating on the built-in corpus (the topics of Python's help, in English); "
    "give --data with text of your own domain for scales that fit it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeRequest:
    """A conversion, from the model's name to where the result goes."""

    model: str | Path
    recipe: Recipe
    revision: str | None = None
    out: Path | None = None
    """None: the model's name and the recipe's, in the current folder."""
    ignore: tuple[str, ...] = ()
    scales: Path | None = None
    """A file that calibration has written; None calibrates where the recipe needs it."""
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    shard_bytes: int = SHARD_BYTES
    rope_order: RopeChoice = "keep"
    rope_proof: Sharing | None = None
    as_written: bool = False
    """Leave Llama-4's q/k/v in formats that vLLM cannot permute."""
    restart: bool = False
    workers: int | None = None
    max_ram: int | None = None

    def arguments(self) -> dict[str, object]:
        """What the output depends on beyond source, recipe and scales, as JSON data."""
        return {
            "ignore": list(self.ignore),
            "shard_bytes": self.shard_bytes,
            "rope_order": self.rope_order,
            "rope_proof": self.rope_proof,
            "as_written": self.as_written,
        }


def plan_of(request: QuantizeRequest) -> tuple[Checkpoint, Plan]:
    """Open the model and plan the conversion: `--dry-run`. Reads headers only."""
    if request.recipe.handed_over:
        raise UsageError(
            f"recipe {request.recipe.name!r}: {request.recipe.handed_over[0]} runs in "
            "llm-compressor, which makes no plan to show"
        )
    ckpt = open_checkpoint(request.model, request.revision)
    plan = make_plan(
        ckpt,
        request.recipe,
        ignore=request.ignore,
        shard_bytes=request.shard_bytes,
        permutable=not request.as_written,
        rope_order=request.rope_order,
        rope_proof=request.rope_proof,
    )
    return ckpt, plan


def quantize(
    request: QuantizeRequest,
    begin: Begin = silent,
    note: Callable[[str], None] = lambda message: None,
) -> Result:
    """Quantize a model as the request says. `note` hears what a user should know on the way."""
    if started().world > 1:
        raise UsageError(
            "conversion runs in one process, on all cores; under torchrun run `ckptq calibrate`, "
            "and give its file to `ckptq quantize --scales`"
        )
    if request.recipe.handed_over:
        return _handed_over(request, begin, note)
    ckpt, plan = plan_of(request)
    source = scales_source(ckpt, plan, request.calibration, request.scales, begin)
    if source is not None and source.runs_model:
        source = _telling(source, request.calibration, note)
    if request.scales is not None:
        _check_fit(plan, request.scales)
    if source is not None and source.doubt is not None:
        note(source.doubt)
    for doubt in vllm_doubts(plan):
        note(f"{request.recipe.name}: {doubt}")
    return write_quantized(
        ckpt,
        plan,
        request.out or default_output(ckpt, request.recipe),
        arguments=request.arguments(),
        scales=source,
        restart=request.restart,
        workers=request.workers,
        max_ram=request.max_ram,
        device=request.calibration.device,
        begin=begin,
    )


def _check_fit(plan: Plan, file: Path) -> None:
    """UsageError, before a run begins, for a file of other scales than the plan's."""
    try:
        scale_tensors(plan, load_scales(file))
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def check_calibrated(plan: Plan) -> None:
    """UsageError for a recipe that `ckptq calibrate` can do nothing for."""
    if plan.attention is None and not plan.inputs:
        raise UsageError(
            f"recipe {plan.recipe.name!r} uses no calibrated scales; fp8-per-head, fp8-per-tensor, "
            "fp8-static and nvfp4 do"
        )


def little_text(made: Scales, wanted: CalibrationRequest) -> str | None:
    """What to tell a user whose text holds fewer samples than were asked for."""
    if wanted.data is None or made.made.samples >= wanted.samples:
        return None
    return (
        f"{wanted.data}: gives {made.made.samples} of the {wanted.samples} samples that were asked "
        f"for, {made.made.tokens:,} tokens in all"
    )


def _telling(
    source: ScalesSource, wanted: CalibrationRequest, note: Callable[[str], None]
) -> ScalesSource:
    """The same source, which says when it begins on a text that nobody chose, or that was short."""

    def load(folder: Path) -> Scales:
        if wanted.data is None:
            note(NO_DATA)
        made = source.load(folder)
        if said := little_text(made, wanted):
            note(said)
        return made

    return replace(source, load=load)


def _handed_over(request: QuantizeRequest, begin: Begin, note: Callable[[str], None]) -> Result:
    if request.rope_order != "keep" or request.rope_proof is not None:
        raise UsageError(
            f"recipe {request.recipe.name!r} runs in llm-compressor, in the source's RoPE order; "
            "run `ckptq permute` on its result"
        )
    unheard = {
        "--ignore": request.ignore,
        "--scales": request.scales,
        "--as-written": request.as_written,
        "--max-ram": request.max_ram,
        "--batch-size": request.calibration.batch_size != 1,
        "--device": request.calibration.device,
    }
    for option, given in unheard.items():
        if given:
            raise UsageError(
                f"recipe {request.recipe.name!r} runs in llm-compressor, as it is written, with "
                "the whole model in memory, sample by sample, on a GPU where there is one; "
                f"{option} does nothing there"
            )
    ckpt = open_checkpoint(request.model, request.revision)
    check_handed_over(request.recipe)
    if request.calibration.data is None:
        note(NO_DATA)
    return write_handed_over(
        ckpt,
        request.recipe,
        request.out or default_output(ckpt, request.recipe),
        request.calibration,
        arguments={**request.arguments(), **request.calibration.arguments()},
        shard_bytes=request.shard_bytes,
        restart=request.restart,
        workers=request.workers,
        begin=begin,
    )
