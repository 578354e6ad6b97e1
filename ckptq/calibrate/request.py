"""From a request to scales: calibrate for a plan, or load a scales file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptq.calibrate.scales import Record, Scales, load_scales, source_fingerprint
from ckptq.checkpoint.open import Checkpoint
from ckptq.device import find_device
from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import SourceError, UsageError
from ckptq.gptq.kept import Kept, kept_in
from ckptq.gptq.told import lines_of, together
from ckptq.optional import require_llmcompressor
from ckptq.plan.unit import Plan
from ckptq.progress import Begin, Note, untold

NO_DATA = (
    "calibrating on the built-in corpus (the topics of Python's help, in English); "
    "use --data with text from your domain for better scales"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRequest:
    """Which text, how much of it, and how it runs through the model."""

    data: str | None = None
    samples: int = 128
    seq_len: int = 2048
    batch_size: int = 1
    seed: int = 0
    trust_remote_code: bool = False

    def arguments(self) -> dict[str, Any]:
        """What the scales depend on, as JSON data; for a file its name, not its path."""
        return {
            "data": Path(self.data).name if self.data else None,
            "samples": self.samples,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalesSource:
    """Where a conversion's scales come from, and what identifies them."""

    arguments: Mapping[str, Any]
    load: Callable[[Path], Scales]
    """Takes the folder for its state, from which it resumes after an interruption."""
    made: Callable[[Path], Kept | None] = lambda folder: None
    """What is quantized where the model runs, kept in that folder."""
    runs_model: bool = False
    """Whether it runs the model, layer by layer, rather than reading a file."""
    doubt: str | None = None
    """A warning that the file was calibrated on another model."""


def scales_source(
    ckpt: Checkpoint,
    plan: Plan,
    wanted: CalibrationRequest,
    file: Path | None,
    device: str | None,
    begin: Begin,
    note: Note = untold,
    ranks: Ranks = ALONE,
) -> ScalesSource | None:
    """None where the plan needs no scales; UsageError for a scales file that nothing needs."""
    needed = plan.calibrated
    if plan.recipe.runs_layers:
        require_llmcompressor(f"the arithmetic of recipe {plan.recipe.name!r}")
    if file is not None and plan.recipe.runs_layers:
        raise UsageError(
            f"{file}: recipe {plan.recipe.name!r} quantizes weights by their inputs, and "
            "calibrates its scales in the same pass; leave --scales out"
        )
    if file is not None:
        if not needed:
            raise UsageError(f"{file}: recipe {plan.recipe.name!r} uses no calibrated scales")
        held = load_scales(file)
        return ScalesSource(
            arguments={"scales_sha256": _digest(file)},
            load=lambda folder: held,
            doubt=_doubt(ckpt, file, held.made),
        )
    if not needed:
        return None
    return ScalesSource(
        arguments=wanted.arguments(),
        load=lambda folder: calibrate_plan(ckpt, plan, wanted, device, begin, folder, ranks, note),
        made=lambda folder: kept_in(folder) if plan.recipe.runs_layers else None,
        runs_model=True,
    )


def calibrate_plan(
    ckpt: Checkpoint,
    plan: Plan,
    wanted: CalibrationRequest,
    device: str | None,
    begin: Begin,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
    note: Note = untold,
) -> Scales:
    """The scales that a plan needs, from the requested text.

    `note` receives a message when no text was chosen, or when it was short.
    """
    from ckptq.autoround.layer_tuner import LayerTuner
    from ckptq.calibrate.run import calibrate
    from ckptq.gptq.layers import LayerQuantizer
    from ckptq.text.samples import read_samples

    _check_calibrated(plan)
    found = find_device(device)
    if wanted.data is None:
        note(NO_DATA)
    samples = ranks.agreed(
        lambda: read_samples(
            wanted.data,
            ckpt.path,
            samples=wanted.samples,
            seq_len=wanted.seq_len,
            seed=wanted.seed,
            trust_remote_code=wanted.trust_remote_code,
        )
    )
    quantizer: LayerQuantizer | LayerTuner | None = None
    if plan.recipe.tuning is not None and folder is not None:
        quantizer = LayerTuner(plan, folder, found)
    elif plan.recipe.runs_layers and folder is not None:
        quantizer = LayerQuantizer(plan, folder, found, ranks)
    report = begin("calibrate", plan.layout.num_layers, "layers")
    made = calibrate(
        ckpt,
        samples,
        attention=plan.attention,
        inputs=plan.inputs,
        input_observer=plan.input_observer,
        batch_size=wanted.batch_size,
        device=str(found),
        trust_remote_code=wanted.trust_remote_code,
        progress=lambda done, total: report(f"layer {done}", 1),
        journal=folder,
        ranks=ranks,
        quantizer=quantizer,
    )
    if quantizer is not None:
        for line in lines_of(together(quantizer.kept.told())):
            note(f"{plan.recipe.name}: {line}")
    if wanted.data is not None and made.made.samples < wanted.samples:
        note(
            f"{wanted.data}: has {made.made.samples} of the {wanted.samples} requested samples, "
            f"{made.made.tokens:,} tokens in all"
        )
    return made


def _check_calibrated(plan: Plan) -> None:
    """UsageError for a recipe that calibration has nothing to do for."""
    if not plan.calibrated:
        raise UsageError(
            f"recipe {plan.recipe.name!r} uses no calibrated scales; fp8-per-head, fp8-per-tensor, "
            "fp8-static and nvfp4 do"
        )


def _doubt(ckpt: Checkpoint, file: Path, made: Record) -> str | None:
    if made.source_fingerprint == source_fingerprint(ckpt):
        return None
    return (
        f"{file}: calibrated on {made.model}, whose config.json or headers differ from those "
        f"of {ckpt.name}; the scales are valid only if the weights are the same"
    )


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from error
