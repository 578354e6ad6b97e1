"""From observations of an engine to its table: one row for each kind of module, in one file.

    python -m ckptq.engines.tabulate OBSERVATIONS.jsonl FOLDER

The file is named by engine and version: FOLDER/vllm-0.32.0.json. Layer and expert numbers become
`*`. Sources of one architecture are united; where two of them disagree about a module the table
says `"mixed"`, and nobody can rely on either.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckptq.numbered import NUMBER, starred


def pattern_of(name: str) -> str:
    """ "model.layers.3.mlp.up_proj" -> "model.layers.*.mlp.up_proj"."""
    return starred(name)


def tabulate(observations: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of a table's file, from the extractor's lines: the engine, then its sources."""
    engine, *sources = observations
    architectures: dict[str, dict[str, Any]] = {}
    failed: dict[str, dict[str, str]] = {}
    for seen in sources:
        name = seen["architecture"]
        if "error" in seen:
            failed.setdefault(name, {})[seen["source"]] = seen["error"]
        else:
            unite(architectures.setdefault(name, {}), architecture_of(seen))
    return {
        "engine": "vllm",
        "version": engine["vllm"],
        "architectures": dict(sorted(architectures.items())),
        "failed": dict(sorted(failed.items())),
        "registry": engine["registry"],
    }


def architecture_of(seen: Mapping[str, Any]) -> dict[str, Any]:
    """What one observation says of its architecture."""
    facts: Mapping[str, Mapping[str, Any]] = seen["modules"]
    asked_as = {name: f.get("asks_as", name) for name, f in facts.items()}
    rows: dict[str, Any] = {}
    merged: list[list[str]] = []
    loaded: set[str] = set()
    for parameter, tensors in seen["landed"].items():
        loaded.update(tensors)
        module, _, local = parameter.rpartition(".")
        modules = [m for t in tensors if (m := module_of(t, seen["tensors"]))]
        if not modules or local.endswith("bias"):
            continue
        fate = facts.get(module, {}).get("fate", "plain")
        engine = asked_as.get(module, module)
        row = [engine_pattern(engine, modules), fate] + ([local] if local != "weight" else [])
        patterns = list(dict.fromkeys(pattern_of(m) for m in modules))
        for pattern in patterns:
            put(rows, pattern, row)
        if len(patterns) > 1 and [row[0], *patterns] not in merged:
            merged.append([row[0], *patterns])
    for tensor in seen["tensors"]:
        if tensor not in loaded and (left := module_of(tensor, seen["tensors"])):
            rows.setdefault(pattern_of(left), [None, "absent"])
    return {
        "class": seen["class"],
        "sources": [f"{seen['source']} ({seen['model_type']})"],
        "packed": seen["packed"],
        "renames": seen["renames"],
        "experts": {
            pattern_of(asked_as[name]): f["experts"] for name, f in facts.items() if "experts" in f
        },
        "attention": agreed(
            (pattern_of(asked_as[name]), f["attention"])
            for name, f in facts.items()
            if "attention" in f
        ),
        "heads": agreed(
            (pattern_of(name), "tied" if "tied_to" in f else "own")
            for name, f in facts.items()
            if f["class"] == "ParallelLMHead"
        ),
        "shares_cache": {
            name: f["shares_cache_of"] for name, f in facts.items() if "shares_cache_of" in f
        },
        "written": {
            f"{seen['source']} {half}": outcome(result)
            for half, result in seen["written"].items()
            if result
        },
        "unfilled": sorted({pattern_of(name) for name in seen["unfilled"]}),
        "merged": sorted(merged),
        "modules": dict(sorted(rows.items())),
    }


def outcome(result: Mapping[str, Any]) -> str:
    """One line of how loading the quantized checkpoint ended, where it did not end well."""
    if "error" in result:
        return str(result["error"])
    if "unfilled" not in result:
        return f"loads as {result['names']}"
    return "not filled: " + ", ".join(sorted({pattern_of(name) for name in result["unfilled"]}))


def agreed(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """One value a name, "mixed" where several were seen."""
    values: dict[str, str] = {}
    for name, value in pairs:
        values[name] = value if values.get(name, value) == value else "mixed"
    return dict(sorted(values.items()))


def module_of(tensor: str, shapes: Mapping[str, list[int]]) -> str | None:
    """The module whose weight a tensor is; None for biases, norms and other vectors.

    A fused tensor of experts, which no module's name ends before, counts as a module of its own.
    """
    if len(shapes[tensor]) < 2 or tensor.endswith("bias"):
        return None
    return tensor.removesuffix(".weight")


def engine_pattern(engine: str, modules: list[str]) -> str:
    """The engine's name with `*` for its numbers, if they are the first ones of the names on disk.

    Where they are not, as "mtp.layers.0" of "model.layers.61", they stay: nobody can read them off.
    """
    numbers = NUMBER.findall(engine)
    same = all(NUMBER.findall(module)[: len(numbers)] == numbers for module in modules)
    return pattern_of(engine) if same else engine


def put(rows: dict[str, Any], pattern: str, row: list[Any]) -> None:
    """Add a row; of two that disagree none is right."""
    before = rows.get(pattern)
    if before is None or before[1] == "absent":
        rows[pattern] = row
    elif before[1] != row[1] and row[1] != "absent":
        rows[pattern] = [before[0], "mixed", *before[2:]]


def unite(known: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Fold another source of the same architecture in."""
    if not known:
        known.update(new)
        return
    known["sources"] = sorted({*known["sources"], *new["sources"]})
    for key in ("packed", "experts", "shares_cache", "written"):
        known[key] = {**known[key], **new[key]}
    for key in ("attention", "heads"):
        known[key] = agreed([*known[key].items(), *new[key].items()])
    known["renames"] = {**new["renames"], **known["renames"]}
    known["merged"] = sorted({tuple(m) for m in (*known["merged"], *new["merged"])})
    known["unfilled"] = sorted({*known["unfilled"], *new["unfilled"]})
    for pattern, row in new["modules"].items():
        put(known["modules"], pattern, row)
    known["modules"] = dict(sorted(known["modules"].items()))


def dump(table: Mapping[str, Any]) -> str:
    """JSON with one row a line, so that two versions can be compared."""
    return _dump(table, "", depth=4) + "\n"


def _dump(value: Any, indent: str, depth: int) -> str:
    if not depth or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {_dump(v, inner, depth - 1)}" for k, v in value.items()]
        opening, closing = "{}"
    elif any(isinstance(item, list | tuple) for item in value):
        items = [json.dumps(item) for item in value]
        opening, closing = "[]"
    else:
        return json.dumps(value)
    return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{closing}"


def main() -> None:
    observations, folder = map(Path, sys.argv[1:])
    table = tabulate(json.loads(line) for line in observations.read_text().splitlines())
    out = folder / f"{table['engine']}-{table['version']}.json"
    out.write_text(dump(table))
    print(f"{out}: {len(table['architectures'])} architectures")
    for architecture, sources in table["failed"].items():
        for source, error in sources.items():
            print(f"failed: {source} ({architecture}): {error}")


if __name__ == "__main__":
    main()
