"""Each result as text: a table or a few lines. `--json` prints the same as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ckptq.numbered import starred
from ckptq.printable import shell_word, size
from ckptq.show import console

if TYPE_CHECKING:
    from ckptq.calibrate.scales import Scales
    from ckptq.convert.permute import Permuted
    from ckptq.convert.run import Result
    from ckptq.inspect import Inspection
    from ckptq.plan.unit import Plan, Unit
    from ckptq.recipes.scheme import Recipe


MOST_KINDS = 1000
"""Rows of `inspect`'s table; the largest known checkpoint needs 60."""

NOWHERE = "with an engine that takes it as it is written; vLLM and transformers do not"


def show_quantized(result: Result, json: bool) -> None:
    """The result of `quantize`, and the command that serves it."""
    if json:
        console.show_json(result)
        return
    ratio = result.output_bytes / result.source_bytes
    resumed = (
        f", {result.resumed_units} units were done by an earlier run"
        if result.resumed_units
        else ""
    )
    layers = result.layers_with_scales
    console.show_lines(
        f"{result.out}: {result.scheme}, {result.linears} Linears quantized"
        + (f", q/k/v scales in {layers} layers" if layers else "")
        + resumed,
        f"{size(result.source_bytes)} -> {size(result.output_bytes)} ({ratio:.0%})",
        *([f"uploaded:   {result.pushed}"] if result.pushed else []),
        f"verify it:  ckptq verify {shell_word(result.out)} --source {shell_word(result.source)}",
        _use(result),
    )


def show_part(result: Result, part: str) -> None:
    """The result of `quantize --part`."""
    console.show_lines(
        f"{result.out}: part {part}, {size(result.output_bytes)}",
        "when all parts are there: the same command with --join in place of --part",
    )


def _use(result: Result) -> str:
    if result.serve is None and result.load is not None:
        return f"load it:    {result.load} (vLLM does not)"
    return f"serve it:   {result.serve or NOWHERE}"


def show_plan(plan: Plan, json: bool) -> None:
    """`--dry-run`: units with their rule and bytes, similar ones together; `--json` has each."""
    if json:
        console.show_json(plan_data(plan))
        return
    alike: dict[tuple[str, str], list[Unit]] = {}
    for unit in plan.units:
        alike.setdefault((starred(unit.key), unit.rule), []).append(unit)
    console.show_table(
        f"plan for {plan.recipe.name}",
        ("unit", "rule", "count", "bytes in", "bytes out"),
        [
            (
                units[0].key if len(units) == 1 else name, rule, len(units),
                sum(unit.read_bytes for unit in units), sum(unit.write_bytes for unit in units),
            )
            for (name, rule), units in alike.items()
        ],
    )  # fmt: skip
    quantized = sum(len(names) for names in plan.groups.values())
    console.show_lines(
        *plan.told,
        f"{len(plan.units)} units, {quantized} Linears quantized, {len(plan.ignore)} left alone, "
        f"{len(plan.shards)} shard(s), {size(plan.read_bytes)} -> {size(plan.write_bytes)}",
    )


def plan_data(plan: Plan) -> dict[str, Any]:
    """The plan as data, output tensors with shape, dtype and shard."""
    return {
        "scheme": plan.recipe.name,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "ignore": list(plan.ignore),
        "left": list(plan.told),
        "groups": {name: list(linears) for name, linears in plan.groups.items()},
        "units": [
            {
                "unit": unit.key,
                "rule": unit.rule,
                "shard": shard,
                "read_bytes": unit.read_bytes,
                "writes": {
                    name: {"dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.nbytes}
                    for name, spec in unit.writes.items()
                },
            }
            for shard, units in plan.shards.items()
            for unit in units
        ],
    }


def show_inspection(found: Inspection, json: bool) -> None:
    """`inspect`: a summary of the checkpoint, then its tensors, similar ones together."""
    if json:
        console.show_json(found)
        return
    heads = f"{found.heads[0]} query and {found.heads[1]} kv heads" if found.heads else "no heads"
    dtypes = ", ".join(f"{name} {size(n)}" for name, n in found.bytes_by_dtype.items())
    console.show_lines(
        f"{found.path}: {found.architecture} ({found.model_type})",
        f"{found.layers} layers, {heads}; {found.tensors} tensors in {found.files} file(s), "
        f"{size(found.nbytes)}: {dtypes}",
        f"quantization: {found.scheme}",
        *(f"  {name}: {text}" for name, text in found.groups.items()),
        *([f"  KV cache: {found.kv_cache}"] if found.kv_cache else []),
        *([f"RoPE order marked: {found.rope_order}"] if found.rope_order else []),
        "",
    )
    console.show_table(
        "",
        ("tensors", "stored as", "count", "size"),
        [
            (kind.name, kind.spec, kind.count, size(kind.nbytes))
            for kind in found.kinds[:MOST_KINDS]
        ],
    )
    if len(found.kinds) > MOST_KINDS:
        console.show_lines(f"and {len(found.kinds) - MOST_KINDS:,} more kinds; see --json")


def show_scales(file: Path, scales: Scales, json: bool) -> None:
    """The result of `calibrate`: how many scales, and their range."""
    if json:
        console.show_json({"file": file, **scales.record(), "scales": len(scales.tensors)})
        return
    rows = []
    for which in ("q_scale", "k_scale", "v_scale", "input_scale", "input_global_scale"):
        found = [t for name, t in scales.tensors.items() if name.endswith(f".{which}")]
        if found:
            low = min(float(t.min()) for t in found)
            high = max(float(t.max()) for t in found)
            rows.append((which, len(found), tuple(found[0].shape), low, high))
    made = scales.made
    title = f"{file}: {made.model} on {made.text}, samples: {made.samples}, tokens: {made.tokens:,}"
    console.show_table(title, ("scale", "count", "shape", "smallest", "largest"), rows)


def show_recipes(found: Mapping[str, str], json: bool) -> None:
    """`recipes`: each name, and what it does."""
    if json:
        console.show_json(dict(found))
    else:
        console.show_table("", ("scheme", "what it does"), list(found.items()))


def show_recipe(recipe: Recipe, json: bool) -> None:
    """`recipes NAME`: the recipe as YAML, or as data."""
    if json:
        console.show_json(yaml.safe_load(recipe.text))
    else:
        console.show_lines(*recipe.text.rstrip().splitlines())


def show_permuted(done: Permuted, json: bool) -> None:
    """The result of `permute`: what moved, and the mark."""
    if json:
        console.show_json(done)
        return
    moved = ", ".join(f"{count} {part}" for part, count in done.moved.items())
    console.show_lines(
        f"{done.out}: {moved} of q/k permuted, {done.copied} tensors copied; marked {done.mark!r}"
    )
