"""`ckptq quantize`, as one function: open, plan, check, calibrate, convert, publish."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.journal import Journal, check_apart
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import Files
from ckptq.checkpoint.write import Shards, write_index
from ckptq.convert import documents
from ckptq.convert.preflight import check_disk, check_layers, slab_rooms
from ckptq.convert.proof_cost import ProofCost, proof_cost
from ckptq.device import find_device
from ckptq.errors import UsageError
from ckptq.models.encoded import unquantized_config
from ckptq.permute.marks import marked_config, marked_metadata
from ckptq.plan.doubts import vllm_doubts
from ckptq.plan.unit import Plan, Unit
from ckptq.progress import Begin, Report, silent
from ckptq.recipes.load import Recipe
from ckptq.spec import TensorSpec, spec_of

if TYPE_CHECKING:
    from torch import Tensor

    from ckptq.calibrate.request import ScalesSource
    from ckptq.calibrate.scales import Scales

METADATA = {"format": "pt"}

MOST_WORKERS = 8
"""More do not get past Python's lock any faster; see ckptq.convert.arithmetic."""

COMMIT_BYTES = 1 << 28
"""As much work as a killed run may lose: a second or less."""


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
    rope_proof: ProofCost | None = None
    """What `--rope-proof` costs, where it was asked for."""
    serve: str | None
    """The command for vLLM; None where the checkpoint is for engines that do not permute q/k."""


def write_quantized(
    ckpt: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    arguments: Mapping[str, Any],
    scales: ScalesSource | None = None,
    restart: bool = False,
    workers: int | None = None,
    max_ram: int | None = None,
    device: str | None = None,
    commit_bytes: int = COMMIT_BYTES,
    begin: Begin = silent,
) -> Result:
    """Carry out a plan; `out` appears whole at the end, or not at all.

    An interrupted run goes on when it is called again with the same source, plan and arguments, and
    ends byte-identical. `arguments` is what the output depends on beyond source and recipe, as JSON
    data; it becomes part of the journal's fingerprint and of the provenance record. `commit_bytes`
    is how much may be written between two entries of the journal. `device` is who quantizes: the
    cores unless it names a GPU; it changes no byte.
    """
    workers = workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    check_apart(ckpt.path, out)
    check_disk(plan, out)
    find_device(device)
    rooms = slab_rooms(plan, max_ram, workers)
    if scales is not None and scales.runs_model:
        check_layers(ckpt, plan, device)
    record = {
        "arguments": {**arguments, **(scales.arguments if scales is not None else {})},
        "recipe": plan.recipe.text,
        "source": documents.source_record(ckpt),
        "versions": documents.versions(),
    }
    journal = Journal.open(out, {**record, "modified": modified(ckpt)}, restart=restart)
    resumed = len(journal.done)
    try:
        if not journal.published:
            made = scales.load(journal.calibration) if scales is not None else None
            report = begin("quantize", plan.read_bytes)
            convert_plan(plan, journal, made, workers, rooms, commit_bytes, report, device)
            _write_documents(ckpt, plan, journal, made, record)
        journal.publish()
    finally:
        journal.close()
    return Result(
        out=out,
        source=str(ckpt.path),
        scheme=plan.recipe.name,
        source_bytes=ckpt.nbytes,
        output_bytes=plan.write_bytes,
        linears=sum(len(names) for names in plan.groups.values()),
        layers_with_scales=len(plan.attention.scales) if plan.attention else 0,
        resumed_units=resumed,
        rope_proof=proof_cost(plan),
        serve=serve_line(out, plan),
    )


def convert_plan(
    plan: Plan,
    journal: Journal,
    scales: Scales | None,
    workers: int,
    rooms: tuple[int, int],
    commit_bytes: int,
    report: Report,
    device: str | None = None,
) -> None:
    """Fill the journal's scratch folder with the plan's shards and their index."""
    from ckptq.convert.arithmetic import arithmetic_on
    from ckptq.convert.pipeline import Ends, convert
    from ckptq.convert.pipeline import workers as make_pool
    from ckptq.convert.schedule import Committer, Schedule
    from ckptq.convert.slabs import Slabs

    specs = {shard: _specs(units) for shard, units in plan.shards.items()}
    shard_of = {unit.key: shard for shard, units in plan.shards.items() for unit in units}
    tensors = scale_tensors(plan, scales)
    arithmetic = arithmetic_on(device, workers)
    shards = Shards(
        journal.scratch, specs, marked_metadata(METADATA, plan.marks) if plan.marks else METADATA
    )
    committer = Committer(journal, shards, shard_of, commit_bytes)
    pool = make_pool(workers)

    def finished(unit: Unit) -> None:
        committer.finished(unit)
        report(unit.key, unit.read_bytes)

    try:
        with Files() as files:
            todo = []
            for unit in plan.units:
                if unit.key in journal.done:
                    report(unit.key, unit.read_bytes)
                else:
                    todo.append(unit)
            ends = Ends(
                files=files,
                scales=tensors,
                shards=shards,
                slabs=Slabs(*rooms),
                arithmetic=arithmetic,
            )
            try:
                convert(todo, ends, Schedule(pool, max_tasks=8 * workers), finished)
            finally:
                pool.shutdown(cancel_futures=True)
        committer.flush()
    finally:
        committer.close()
        shards.close()
    write_index(journal.scratch, specs)


def _specs(units: tuple[Unit, ...]) -> dict[str, TensorSpec]:
    return {name: spec for unit in units for name, spec in unit.writes.items()}


def scale_tensors(plan: Plan, scales: Scales | None) -> dict[str, Tensor]:
    """The calibrated tensors that the plan promises; UsageError where they are not those."""
    wanted = {name: spec for unit in plan.units for name, spec in unit.scales.items()}
    found = scales.tensors if scales is not None else {}
    for name, spec in wanted.items():
        if name not in found:
            raise UsageError(
                f"{_origin(scales)}: {name} is missing; they are of another model or scheme"
            )
        got = spec_of(found[name])
        if got != spec:
            raise UsageError(
                f"{_origin(scales)}: {name} is {got}, wanted {spec} for {plan.recipe.name}"
            )
    return {name: found[name] for name in wanted}


def _origin(scales: Scales | None) -> str:
    if scales is None:
        return "scales"
    shared = {"attn_head": ", a scale per head", "tensor": ", a scale per layer"}
    return f"the scales of {scales.made.model}{shared.get(scales.made.strategy or '', '')}"


def _write_documents(
    ckpt: Checkpoint, plan: Plan, journal: Journal, scales: Scales | None, record: Mapping[str, Any]
) -> None:
    attention_class = scales.attention_class if scales and plan.attention else None
    quantization = documents.quantization_config(plan, attention_class)
    config = {**unquantized_config(ckpt.config), "quantization_config": quantization}
    if plan.marks:
        config = marked_config(config, plan.marks)
    provenance = {k: v for k, v in record.items() if k != "recipe"}
    if scales is not None:
        provenance["calibration"] = scales.record()
    documents.write_documents(journal.scratch, ckpt, config, plan, provenance)


def modified(ckpt: Checkpoint) -> dict[str, int]:
    """Times of the source's files: a journal, unlike the output, may know of them."""
    return {h.file.name: h.file.stat().st_mtime_ns for h in ckpt.headers}


def default_output(ckpt: Checkpoint, recipe: Recipe) -> Path:
    """The model's name with the scheme's, in the current folder."""
    return Path(f"{ckpt.name.rpartition('/')[2]}-{recipe.name}")


def serve_line(out: Path, plan: Plan) -> str | None:
    """The command that serves the result; None where vLLM would permute q/k a second time, or
    there are other doubts."""
    moved = any(order != plan.layout.family.rope for order in plan.marks.values())
    if moved or any(vllm_doubts(plan)):
        return None
    line = f"vllm serve {out}"
    if plan.attention is None:
        return line
    line += " --kv-cache-dtype fp8"
    if plan.attention.strategy == "attn_head":
        line += " --attention-backend FLASH_ATTN"
    return line
