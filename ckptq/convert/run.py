"""A plan of `ckptq quantize`, carried out: check, calibrate, convert, publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ckptq.calibrate.request import ScalesSource
from ckptq.calibrate.scales import Scales
from ckptq.checkpoint.hub.chunks import HELD_BYTES
from ckptq.checkpoint.hub.snapshot import with_network
from ckptq.checkpoint.hub.upload import Destination, Upload
from ckptq.checkpoint.journal import Journal
from ckptq.checkpoint.open import INDEX, Checkpoint
from ckptq.convert import documents
from ckptq.convert.output import DEFAULTS, Job, RunOptions, write_output
from ckptq.convert.preflight import check_disk, check_layers, slab_rooms
from ckptq.device import find_device
from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import UsageError
from ckptq.gptq.kept import Kept
from ckptq.gptq.told import together
from ckptq.models.encoded import unquantized_config
from ckptq.permute.marks import marked_config
from ckptq.plan.doubts import transformers_doubts, vllm_doubts
from ckptq.plan.unit import Plan
from ckptq.printable import shell_word
from ckptq.progress import Begin, Note, silent, untold
from ckptq.recipes.scheme import Recipe
from ckptq.spec import spec_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a conversion has made."""

    out: Path
    source: str
    scheme: str
    source_bytes: int
    output_bytes: int
    linears: int
    layers_with_scales: int
    resumed_units: int
    serve: str | None
    """The command for vLLM; None if vLLM cannot serve the checkpoint correctly."""
    load: str | None
    """The call that loads it in transformers; None if transformers cannot."""
    pushed: str | None = None
    """Address of the commit on the hub, if it was uploaded."""


def write_quantized(
    ckpt: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    arguments: Mapping[str, Any],
    scales: ScalesSource | None = None,
    options: RunOptions = DEFAULTS,
    ranks: Ranks = ALONE,
    begin: Begin = silent,
    note: Note = untold,
) -> Result:
    """Carry out a plan; `out` appears whole at the end, or not at all (`write_output`).

    `arguments` is what the output depends on beyond source and recipe, as JSON data; it becomes
    part of the journal's fingerprint and of the provenance record.
    """
    part = options.part
    shards = plan.shards if part is None else part.share(plan.shards)
    nbytes = sum(unit.write_bytes for units in shards.values() for unit in units)
    arguments = {**arguments, **(scales.arguments if scales is not None else {})}
    record = documents.run_record(ckpt, arguments, plan.recipe)

    def check() -> tuple[tuple[int, int], Upload | None]:
        if not options.join:  # which moves what is there
            check_disk(nbytes, out if part is None else part.folder(out), ckpt.side_bytes())
        find_device(options.device)
        if scales is not None and scales.runs_model:
            check_layers(ckpt, plan, options.device)
        made_now = _documents(ckpt, plan, None, record)  # fail now if they cannot be written
        held = HELD_BYTES if ckpt.streamed is not None else 0
        rooms = slab_rooms(plan.units, options.max_ram, options.threads, held)
        return rooms, _upload(ckpt, plan, options.push, made_now[documents.CARD], note)

    rooms, upload = ranks.agreed(check)

    def prepare(journal: Journal) -> Job:
        made, kept = None, None
        if scales is not None and not journal.renamed:
            made = scales.load(journal.calibration)
            kept = scales.made(journal.calibration)
        return Job(
            name="quantize",
            shards=shards,
            marks=plan.marks,
            documents=_documents(ckpt, plan, made, record, kept),
            scales=scale_tensors(plan, made) if not journal.renamed else {},
            made=kept.stored() if kept is not None else {},
            workers=options.threads,
            device=options.device,
            rooms=rooms,
            source_lasts=ckpt.streamed is None,
        )

    begin = begin if ckpt.streamed is None else with_network(begin, ckpt.streamed)
    resumed = write_output(
        ckpt, out, record, prepare, part=part, join=options.join,
        restart=options.restart, ranks=ranks, upload=upload, begin=begin, note=note,
    )  # fmt: skip
    made = result_of(ckpt, plan, out, resumed)
    if upload is not None:
        made = replace(made, pushed=upload.url)
    if part is None:
        return made
    return replace(made, out=part.folder(out), output_bytes=nbytes, serve=None, load=None)


def _upload(
    ckpt: Checkpoint, plan: Plan, to: Destination | None, card: bytes, note: Note
) -> Upload | None:
    """The way to the hub, if the output goes there."""
    if to is None:
        return None
    index = [INDEX] if len(plan.shards) > 1 else []
    return Upload(to, {*plan.shards, *index, *map(str, ckpt.side_files())}, card, note)


def result_of(ckpt: Checkpoint, plan: Plan, out: Path, resumed: int) -> Result:
    """What to report of a finished output; `resumed` units came from an earlier run."""
    return Result(
        out=out,
        source=str(ckpt.path) if ckpt.streamed is None else ckpt.name,
        scheme=plan.recipe.name,
        source_bytes=ckpt.nbytes,
        output_bytes=plan.write_bytes,
        linears=sum(len(names) for names in plan.groups.values()),
        layers_with_scales=len(plan.attention.scales) if plan.attention else 0,
        resumed_units=resumed,
        serve=serve_line(out, plan),
        load=load_line(out, plan),
    )


def _documents(
    ckpt: Checkpoint,
    plan: Plan,
    scales: Scales | None,
    record: Mapping[str, Any],
    kept: Kept | None = None,
) -> dict[str, bytes]:
    attention_class = scales.attention_class if scales and plan.attention else None
    quantization = documents.quantization_config(plan, attention_class)
    config = {**unquantized_config(ckpt.config), **quantization}
    if plan.marks:
        config = marked_config(config, plan.marks)
    made = {"calibration": scales.record()} if scales is not None else {}
    if kept is not None:
        made["by_inputs"] = together(kept.told()).to_json()
    return documents.render(ckpt, config, plan, {**record, **made})


def default_output(name: str, recipe: Recipe) -> Path:
    """The model's name with the scheme's, in the current folder."""
    return Path(f"{name.rpartition('/')[2]}-{recipe.name}")


def serve_line(out: Path, plan: Plan) -> str | None:
    """The command that serves the result; None if vLLM would permute q/k a second time or
    cannot load it."""
    if _reordered(plan) or any(vllm_doubts(plan)):
        return None
    line = f"vllm serve {shell_word(out)}"
    if plan.attention is None:
        return line
    line += " --kv-cache-dtype fp8"
    if plan.attention.strategy == "attn_head":
        line += " --attention-backend FLASH_ATTN"
    return line


def scale_tensors(plan: Plan, scales: Scales | None) -> dict[str, Tensor]:
    """The calibrated tensors that the plan needs; UsageError if they do not match."""
    wanted = {name: spec for unit in plan.units for name, spec in unit.scales.items()}
    found: Mapping[str, Tensor] = scales.tensors if scales is not None else {}
    for name, spec in wanted.items():
        if name not in found:
            raise UsageError(
                f"{_origin(scales)}: {name} is missing; they are for another model or scheme"
            )
        got = spec_of(found[name])
        if got != spec:
            raise UsageError(
                f"{_origin(scales)}: {name} is {got}; expected {spec} for {plan.recipe.name}"
            )
    return {name: found[name] for name in wanted}


def _origin(scales: Scales | None) -> str:
    if scales is None:
        return "scales"
    shared = {"attn_head": ", one scale per head", "tensor": ", one scale per layer"}
    return f"the scales of {scales.made.model}{shared.get(scales.made.strategy or '', '')}"


def load_line(out: Path, plan: Plan) -> str | None:
    """The call that loads the result in transformers, which never permutes q/k."""
    tree = plan.layout.witnesses.tree
    if tree is None or _reordered(plan) or any(transformers_doubts(plan)):
        return None
    return f"transformers.{tree.model_class}.from_pretrained({str(out)!r})"


def _reordered(plan: Plan) -> bool:
    return any(order != plan.layout.family.rope for order in plan.marks.values())
