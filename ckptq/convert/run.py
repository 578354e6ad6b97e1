"""`ckptq quantize`, as one function: open, plan, check, calibrate, convert, publish."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.identity import check_unchanged, lasting
from ckptq.checkpoint.journal import Journal, check_apart
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.side_files import write_side_files
from ckptq.convert import documents
from ckptq.convert.fill import COMMIT_BYTES, Job, convert_plan, prove_renamed
from ckptq.convert.preflight import check_disk, check_layers, slab_rooms
from ckptq.device import find_device
from ckptq.models.encoded import unquantized_config
from ckptq.permute.marks import marked_config
from ckptq.plan.doubts import transformers_doubts, vllm_doubts
from ckptq.plan.unit import Plan
from ckptq.printable import shell_word
from ckptq.progress import Begin, Note, silent, untold
from ckptq.recipes.load import Recipe

if TYPE_CHECKING:
    from ckptq.calibrate.request import ScalesSource
    from ckptq.calibrate.scales import Scales

MOST_WORKERS = 8
"""More do not get past Python's lock any faster; see ckptq.convert.arithmetic."""


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
    """The command for vLLM; None where it would not load the checkpoint, or compute otherwise."""
    load: str | None
    """The call that loads it in transformers; None where transformers cannot."""


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
    note: Note = untold,
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
    check_disk(plan, out, ckpt.side_bytes())
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
    _documents(ckpt, plan, None, record)  # what cannot be written is found out now
    pinned = ckpt.pinned()
    journal = Journal.open(out, {**record, "modified": lasting(ckpt.path, pinned)}, restart=restart)
    try:
        job = Job(
            plan=plan,
            journal=journal,
            workers=workers,
            rooms=rooms,
            commit_bytes=commit_bytes,
            device=device,
        )
        written: list[str] = []
        if journal.renamed:
            resumed = prove_renamed(job)
        else:
            made = scales.load(journal.calibration) if scales is not None else None
            resumed = convert_plan(job, made, begin("quantize", plan.read_bytes), note)
            small = _documents(ckpt, plan, made, record)
            written = write_side_files(journal.scratch, ckpt, small, job.specs, pinned)
        check_unchanged(pinned)
        journal.publish(job.specs, written)
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
        serve=serve_line(out, plan),
        load=load_line(out, plan),
    )


def _documents(
    ckpt: Checkpoint, plan: Plan, scales: Scales | None, record: Mapping[str, Any]
) -> dict[str, bytes]:
    attention_class = scales.attention_class if scales and plan.attention else None
    quantization = documents.quantization_config(plan, attention_class)
    config = {**unquantized_config(ckpt.config), "quantization_config": quantization}
    if plan.marks:
        config = marked_config(config, plan.marks)
    provenance = {k: v for k, v in record.items() if k != "recipe"}
    if scales is not None:
        provenance["calibration"] = scales.record()
    return documents.render(ckpt, config, plan, provenance)


def default_output(ckpt: Checkpoint, recipe: Recipe) -> Path:
    """The model's name with the scheme's, in the current folder."""
    return Path(f"{ckpt.name.rpartition('/')[2]}-{recipe.name}")


def serve_line(out: Path, plan: Plan) -> str | None:
    """The command that serves the result; None where vLLM would permute q/k a second time, or
    there are other doubts."""
    if _reordered(plan) or any(vllm_doubts(plan)):
        return None
    line = f"vllm serve {shell_word(out)}"
    if plan.attention is None:
        return line
    line += " --kv-cache-dtype fp8"
    if plan.attention.strategy == "attn_head":
        line += " --attention-backend FLASH_ATTN"
    return line


def load_line(out: Path, plan: Plan) -> str | None:
    """The call that loads the result in transformers, which does not permute q/k, either."""
    tree = plan.layout.witnesses.tree
    if tree is None or _reordered(plan) or any(transformers_doubts(plan)):
        return None
    return f"transformers.{tree.model_class}.from_pretrained({str(out)!r})"


def _reordered(plan: Plan) -> bool:
    return any(order != plan.layout.family.rope for order in plan.marks.values())
