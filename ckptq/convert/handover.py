"""Recipes that llm-compressor runs: AWQ, SmoothQuant, SpinQuant, and GPTQ behind one of these.

It loads the whole model and writes a checkpoint of its own; that goes through the same writer as
everything else (shards, side files, provenance, RoPE order, one rename) and is verified at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptq.calibrate.request import CalibrationRequest
from ckptq.checkpoint.header import by_place
from ckptq.checkpoint.journal import Journal
from ckptq.checkpoint.open import CONFIG, Checkpoint, open_checkpoint
from ckptq.checkpoint.seal import is_whole
from ckptq.checkpoint.side_files import render_json
from ckptq.convert import documents
from ckptq.convert.oneshot import run_oneshot
from ckptq.convert.output import DEFAULTS, Job, RunOptions, write_output
from ckptq.convert.run import Result, result_of
from ckptq.errors import FoundWrong, UsageError
from ckptq.models.encoded import read_encoded, unquantized_config
from ckptq.models.modules import read_layout
from ckptq.plan.shards import SHARD_BYTES, fill_shards
from ckptq.plan.unit import Plan, Unit
from ckptq.progress import Begin, Note, silent, untold
from ckptq.recipes.scheme import Recipe

HANDED_OVER = ("GPTQModifier", "AWQModifier", "SmoothQuantModifier", "SpinQuantModifier")


def check_handed_over(recipe: Recipe) -> None:
    """UsageError for modifiers that neither ckptq nor llm-compressor runs here."""
    for name in recipe.handed_over:
        if name not in HANDED_OVER:
            raise UsageError(
                f"recipe {recipe.name!r}: {name} is not supported; "
                f"ckptq hands {', '.join(HANDED_OVER)} to llm-compressor"
            )
    if recipe.handed_over and recipe.attention is not None:
        raise UsageError(
            f"recipe {recipe.name!r}: {recipe.handed_over[0]} runs in llm-compressor, which leaves "
            "q scales uninitialised (0.14); quantize the weights and the cache separately"
        )


def write_handed_over(
    ckpt: Checkpoint,
    recipe: Recipe,
    out: Path,
    wanted: CalibrationRequest,
    *,
    arguments: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    options: RunOptions = DEFAULTS,
    begin: Begin = silent,
    note: Note = untold,
) -> Result:
    """Let llm-compressor's `oneshot` quantize the model, then write, publish and verify its result.

    The whole model is in memory while it works. FoundWrong if the result is wrong.
    """
    check_handed_over(recipe)
    arguments = {**arguments, "handed_over": list(recipe.handed_over)}
    record = documents.run_record(ckpt, arguments, recipe)
    render_json(ckpt.path / CONFIG, unquantized_config(ckpt.config))  # else it would fail last

    def prepare(journal: Journal) -> Job:
        made = out if journal.renamed else journal.partial / "oneshot"
        if not journal.renamed and not is_whole(made):
            with redirect_stdout(sys.stderr):  # stdout is for results
                run_oneshot(ckpt, recipe, made, wanted)
        plan = _plan_copies(made, recipe, None if journal.renamed else shard_bytes)
        return Job(
            name="write",
            shards=plan.shards,
            marks=plan.marks,
            documents=_documents(ckpt, plan, made, record),
            workers=options.threads,
            source_lasts=False,
        )

    resumed = write_output(
        ckpt, out, record, prepare, restart=options.restart, begin=begin, note=note
    )
    _verify(out, ckpt)
    return result_of(ckpt, _plan_copies(out, recipe, None), out, resumed)


def _plan_copies(made: Path, recipe: Recipe, shard_bytes: int | None) -> Plan:
    """Copy every tensor; the groups are those that the result's config declares.

    Shards are filled to `shard_bytes`; None leaves each tensor in the one that it is in.
    """
    result = open_checkpoint(made)
    units = {
        name: Unit(key=name, rule="made by llm-compressor", copies={name: tensor})
        for name, tensor in result.tensors.items()
    }
    if shard_bytes is None:
        held = [(h.file.name, [t.name for t in by_place(h)]) for h in result.headers]
        shards = {file: tuple(units[name] for name in names) for file, names in held}
    else:
        shards = fill_shards(list(units.values()), shard_bytes)
    return Plan(
        recipe=replace(recipe, groups=()),
        units=tuple(units.values()),
        shards=shards,
        groups={"llm-compressor": tuple(read_encoded(result))},
        inputs={},
        input_observer="static_minmax",
        ignore=(),
        attention=None,
        layout=read_layout(result),
    )


def _documents(
    ckpt: Checkpoint, plan: Plan, made: Path, record: Mapping[str, Any]
) -> dict[str, bytes]:
    quantization = open_checkpoint(made).quantization_config
    config = {**unquantized_config(ckpt.config), "quantization_config": quantization}
    return documents.render(ckpt, config, plan, record)


def _verify(out: Path, ckpt: Checkpoint) -> None:
    from ckptq.verify.run import verify

    found = verify(out, ckpt.path)
    if not found.ok:
        first = "\n".join(str(finding) for finding in found.findings[:5])
        raise FoundWrong(f"{out}: written, but llm-compressor's result is wrong:\n{first}")
