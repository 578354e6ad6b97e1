"""The files beside the shards: config, recipe, model card, provenance, side files.

Nothing here depends on time, path or threads: the same run writes the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sized
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from ckptq import __version__
from ckptq.checkpoint.bounded import CONFIG_BYTES, read_bounded
from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.checkpoint.side_files import render_json
from ckptq.files import json_bytes, text_bytes
from ckptq.plan.merged import merged_names
from ckptq.plan.unit import Plan
from ckptq.recipes.scheme import DEQUANTIZE, Group, Recipe

PROVENANCE = "ckptq.json"
RECIPE = "recipe.yaml"
CARD = "README.md"

PACKAGES = (
    *("torch", "transformers", "compressed-tensors", "llmcompressor", "auto-round"),
    "safetensors",
)


def quantization_config(plan: Plan, attention_class: str | None) -> dict[str, Any]:
    """config.json's entry for it, or none where the output is not quantized."""
    if plan.recipe.conversion == DEQUANTIZE:
        return {}
    return {"quantization_config": _quantization_config(plan, attention_class)}


def _quantization_config(plan: Plan, attention_class: str | None) -> dict[str, Any]:
    """The `quantization_config` of config.json, as vLLM and transformers read it.

    `config_groups` is always there: without it vLLM refuses per-head scales. An attention group has
    one class name as its target: vLLM knows such a group by a target that ends in "Attention".
    """
    groups = {
        group.name: replace(group, targets=_targets(group, plan, attention_class)).to_dict()
        for group in plan.recipe.groups
        if not group.is_attention or attention_class is not None
    }
    # Linears first: transformers takes the first group with a class name for the experts' scheme
    groups = dict(sorted(groups.items(), key=lambda item: item[1]["weights"] is None))
    kv = plan.recipe.attention
    cache = kv.to_dict() if kv is not None else None
    if plan.kept is not None:
        return plan.kept.with_cache(groups, cache)
    formats = {g.format for g in plan.recipe.groups if not g.is_attention}
    overall = formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense"
    return {
        "quant_method": "compressed-tensors",
        "version": version("compressed-tensors"),
        "quantization_status": "compressed",
        "format": overall,
        "ignore": list(plan.ignore),
        "config_groups": groups,
        "kv_cache_scheme": cache,
    }


def _targets(group: Group, plan: Plan, attention_class: str | None) -> tuple[str, ...]:
    if group.is_attention:
        return (str(attention_class),)
    if "Linear" in group.targets or not any("Linear" in g.targets for g in plan.recipe.groups):
        return group.targets
    return (
        *group.targets,
        *merged_names(group.targets, plan.groups[group.name], plan.layout.witnesses),
    )


def render(
    ckpt: Checkpoint, config: Mapping[str, Any], plan: Plan, record: Mapping[str, Any]
) -> dict[str, bytes]:
    """What is made for the output beside shards and index, by name; SourceError for source data
    that cannot be written."""
    provenance = {key: value for key, value in record.items() if key != "recipe"}
    return {
        CONFIG: render_json(ckpt.path / CONFIG, config),
        **({} if plan.recipe.conversion == DEQUANTIZE else {RECIPE: text_bytes(plan.recipe.text)}),
        CARD: text_bytes(model_card(ckpt, plan)),
        PROVENANCE: json_bytes(provenance, sort_keys=True),
    }


def run_record(
    ckpt: Checkpoint, arguments: Mapping[str, Any], recipe: Recipe | None = None
) -> dict[str, Any]:
    """What an output depends on, as JSON data: the fingerprint of its run, and its provenance."""
    return {
        "arguments": arguments,
        **({"recipe": recipe.text} if recipe is not None else {}),
        "source": _source_record(ckpt),
        "versions": {"ckptq": __version__, **_versions()},
    }


def _versions() -> dict[str, str]:
    """Of the packages that are installed; llm-compressor need not be."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _source_record(ckpt: Checkpoint) -> dict[str, Any]:
    """What identifies the source: names, sizes and header hashes of its files; its config."""
    config, _ = read_bounded(ckpt.path / CONFIG, CONFIG_BYTES)
    return {
        "name": ckpt.name,
        "revision": ckpt.revision,
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "files": {
            header.file.name: {"bytes": header.nbytes, "header_sha256": header.digest}
            for header in ckpt.headers
        },
    }


def model_card(ckpt: Checkpoint, plan: Plan) -> str:
    """A README.md with the front matter that the hub reads, and a description of the run."""
    plain = plan.recipe.conversion == DEQUANTIZE
    what = "dequantized" if plain else "repacked" if plan.recipe.repacks else None
    matter = {
        "base_model": ckpt.name,
        **({} if plain else {"base_model_relation": "quantized"}),
        "library_name": "transformers",
        "tags": [*([] if plain else ["compressed-tensors"]), "vllm", plan.recipe.name],
    }
    lines = [
        "---",
        *yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=math.inf).splitlines(),
        "---",
        "",
        f"# {ckpt.name}, {what or f'quantized with `{plan.recipe.name}`'}",
        "",
        f"Made by ckptq {__version__} from `{ckpt.name}`"
        + (f" at revision `{ckpt.revision}`." if ckpt.revision else "."),
        f"The record of the run is in `{PROVENANCE}`."
        if plain
        else f"The recipe is in `{RECIPE}`, the record of the run in `{PROVENANCE}`.",
        "",
    ]
    for name, linears in plan.groups.items():
        rules = (u.rule for u in plan.units if u.parts and u.rule.startswith(f"{name}: "))
        lines.append(f"- {next(rules, name)}: {_linears(linears)}")
    if plan.attention is not None:
        layers = len(plan.attention.scales)
        kind = "per attention head" if plan.attention.strategy == "attn_head" else "per tensor"
        lines.append(f"- KV cache and attention in FP8, static scales {kind}: {layers} layers")
    if plan.ignore:
        lines.append(f"- left as it was: {_linears(plan.ignore)} (`ignore` in `{CONFIG}`)")
    return "\n".join([*lines, ""])


def _linears(names: Sized) -> str:
    return f"{len(names)} Linear{'' if len(names) == 1 else 's'}"
