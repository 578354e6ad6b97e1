"""Recipes that llm-compressor has to run itself: GPTQ, AWQ, SmoothQuant, SpinQuant.

It loads the whole model and writes a checkpoint of its own; that goes through the same writer as
everything else (shards, side files, provenance, RoPE order, one rename) and is verified at the end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.journal import Journal, check_apart
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.convert import documents
from ckptq.convert.oneshot import DONE, run_oneshot
from ckptq.convert.run import Result, convert_plan, modified, serve_line
from ckptq.errors import FoundWrong, UsageError
from ckptq.models.encoded import read_encoded, unquantized_config
from ckptq.models.modules import read_layout
from ckptq.plan.make import SHARD_BYTES, fill_shards
from ckptq.plan.unit import Plan, Unit
from ckptq.progress import Begin, silent
from ckptq.recipes.load import Recipe

if TYPE_CHECKING:
    from ckptq.calibrate.request import CalibrationRequest

HANDED_OVER = ("GPTQModifier", "AWQModifier", "SmoothQuantModifier", "SpinQuantModifier")


def check_handed_over(recipe: Recipe) -> None:
    """UsageError for what neither ckptq nor llm-compressor on its behalf does."""
    for name in recipe.handed_over:
        if name not in HANDED_OVER:
            raise UsageError(
                f"recipe {recipe.name!r}: {name} is not done by ckptq and not handed over; "
                f"handed to llm-compressor are {', '.join(HANDED_OVER)}"
            )
    if recipe.handed_over and recipe.attention is not None:
        raise UsageError(
            f"recipe {recipe.name!r}: {recipe.handed_over[0]} runs in llm-compressor, whose q "
            "scales are uninitialised memory (0.14); quantize the weights and the cache apart"
        )


def write_handed_over(
    ckpt: Checkpoint,
    recipe: Recipe,
    out: Path,
    wanted: CalibrationRequest,
    *,
    arguments: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    workers: int | None = None,
    begin: Begin = silent,
) -> Result:
    """Let llm-compressor's `oneshot` quantize the model, then write, publish and verify its result.

    The whole model is in memory while it works. FoundWrong if the result is not right.
    """
    check_handed_over(recipe)
    check_apart(ckpt.path, out)
    record = {
        "arguments": {**arguments, "handed_over": list(recipe.handed_over)},
        "recipe": recipe.text,
        "source": documents.source_record(ckpt),
        "versions": documents.versions(),
    }
    journal = Journal.open(out, {**record, "modified": modified(ckpt)}, restart=restart)
    resumed = len(journal.done)
    try:
        made = journal.partial / "oneshot"
        if not journal.published and not (made / DONE).exists():
            with redirect_stdout(sys.stderr):  # stdout is for results
                run_oneshot(ckpt, recipe, made, wanted)
        plan = _plan_copies(made if made.exists() else out, recipe, shard_bytes)
        if not journal.published:
            _rewrite(ckpt, plan, made, journal, record, workers, begin)
        journal.publish()
    finally:
        journal.close()
    _verify(out, ckpt)
    return Result(
        out=out,
        source=str(ckpt.path),
        scheme=recipe.name,
        source_bytes=ckpt.nbytes,
        output_bytes=plan.write_bytes,
        linears=sum(map(len, plan.groups.values())),
        layers_with_scales=0,
        resumed_units=resumed,
        serve=serve_line(out, plan),
    )


def _plan_copies(made: Path, recipe: Recipe, shard_bytes: int) -> Plan:
    """Every tensor as it is; the groups are those that the result's own config declares."""
    result = open_checkpoint(made)
    units = [
        Unit(key=name, rule="made by llm-compressor", copies={name: tensor})
        for name, tensor in result.tensors.items()
    ]
    return Plan(
        recipe=replace(recipe, groups=()),
        units=tuple(units),
        shards=fill_shards(units, shard_bytes),
        groups={"llm-compressor": tuple(read_encoded(result))},
        inputs={},
        input_observer="static_minmax",
        ignore=(),
        attention=None,
        layout=read_layout(result),
    )


def _rewrite(
    ckpt: Checkpoint,
    plan: Plan,
    made: Path,
    journal: Journal,
    record: Mapping[str, Any],
    workers: int | None,
    begin: Begin,
) -> None:
    workers = workers or len(os.sched_getaffinity(0))
    report = begin("write", plan.read_bytes)
    convert_plan(plan, journal, None, workers, (0, 0), 1 << 28, report)
    quantization = open_checkpoint(made).quantization_config
    config = {**unquantized_config(ckpt.config), "quantization_config": quantization}
    provenance = {key: value for key, value in record.items() if key != "recipe"}
    documents.write_documents(journal.scratch, ckpt, config, plan, provenance)


def _verify(out: Path, ckpt: Checkpoint) -> None:
    from ckptq.verify.run import verify

    found = verify(out, ckpt.path)
    if not found.ok:
        first = "\n".join(str(finding) for finding in found.findings[:5])
        raise FoundWrong(f"{out}: written, but llm-compressor's result is not right:\n{first}")
