"""The table of an engine: what it makes of the modules of each architecture.

arch = load_table().architecture(["Qwen3_5MoeForConditionalGeneration"])
arch.fate("model.language_model.layers.7.mlp.gate")                # "plain"
arch.fused_set("model.language_model.layers.7.linear_attn.in_proj_z")
# ("...linear_attn.in_proj_qkv", "...linear_attn.in_proj_z")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from ckptq.engines.architecture import Architecture, Row
from ckptq.engines.renames import renamer

POOLING = re.compile(r"(For\w+Classification|ForRewardModeling|RewardModel|Model)$")
"""Ends of names that vLLM serves by the class of the language model (config/model.py,
`_SUFFIX_TO_DEFAULTS`)."""

FILE = re.compile(r"^(?P<engine>\w+)-(?P<version>\d+(?:\.\d+)*)\.json$")


@dataclass(frozen=True, eq=False)
class EngineTable:
    """All that was extracted from one version of an engine."""

    engine: str
    version: str
    content: Mapping[str, Any] = field(repr=False)

    def architecture(self, names: Sequence[str]) -> Architecture | None:
        """The first of config.json's `architectures` that the table has.

        An architecture that was not tried is taken from another one of the same engine class,
        except for the classes that run any transformers model.
        """
        return next((a for name in names if (a := self._architecture(name))), None)

    def engine_class(self, names: Sequence[str]) -> str | None:
        """The engine's class for an architecture, None if the engine has none of its own."""
        registry = self.content["registry"]
        return next((registry[name] for name in names if name in registry), None)

    def has_class(self, names: Sequence[str]) -> bool:
        """Whether the engine has a class for it, or for its language model."""
        registry = self.content["registry"]
        bases = (POOLING.sub("", name) for name in names)
        generating = (base + end for base in bases for end in ("ForCausalLM", "LMHeadModel"))
        return any(name in registry for name in (*names, *generating))

    def failure(self, names: Sequence[str]) -> str | None:
        """Why the engine failed to load even the unquantized sources of an architecture; None if it
        loaded one.
        """
        if self.architecture(names):
            return None
        failed = self.content["failed"]
        error = next((error for n in names if n in failed for error in failed[n].values()), None)
        return None if error is None else in_short(error)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of all architectures tried."""
        return tuple(self.content["architectures"])

    @cache  # noqa: B019
    def _architecture(self, name: str) -> Architecture | None:
        tried = self.content["architectures"]
        if name in tried:
            return _read_architecture(name, tried[name])
        engine_class = self.engine_class([name])
        if engine_class is None or engine_class.startswith("Transformers"):
            return None
        twin = next((n for n, a in tried.items() if a["class"] == engine_class), None)
        return _read_architecture(name, tried[twin]) if twin else None


def in_short(error: str) -> str:
    """The sentence of an error that states the reason, without class, place or parameters."""
    said = re.sub(r" \(\w+\.py:\d+\)$", "", error).partition("\n  Value error, ")
    return (said[2] or said[0]).removeprefix("ValueError: ").partition(". ")[0].removesuffix(".")


@cache
def load_table(engine: str = "vllm") -> EngineTable:
    """The table of the newest version of an engine. KeyError for an unknown engine."""
    versions = {
        tuple(map(int, match["version"].split("."))): entry
        for entry in files("ckptq.engines").iterdir()
        if (match := FILE.match(entry.name)) and match["engine"] == engine
    }
    if not versions:
        raise KeyError(engine)
    content = json.loads(versions[max(versions)].read_text())
    return EngineTable(engine, content["version"], content)


def _read_architecture(name: str, found: Mapping[str, Any]) -> Architecture:
    merged: dict[str, tuple[str, tuple[str, ...]]] = {}
    for module, *parts in sorted(found["merged"], key=len):  # the largest set of a part stays
        merged |= dict.fromkeys(parts, (module, tuple(parts)))
    refusals, cache_scales = _read_written(found["written"])
    return Architecture(
        name=name,
        engine_class=found["class"],
        sources=tuple(found["sources"]),
        packed={name: tuple(parts) for name, parts in found["packed"].items()},
        rows={pattern: Row(*row) for pattern, row in found["modules"].items()},
        merged=merged,
        expert_names={m: (n[0], n[1], n[2]) for m, n in found["experts"].items()},
        attentions=found["attention"],
        heads=found["heads"],
        unfilled=frozenset(found["unfilled"]),
        shares_cache=bool(found["shares_cache"]),
        refusals=refusals,
        cache_scales=cache_scales,
        rename=renamer(found["renames"]),
    )


def _read_written(written: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """Halves that failed, and the name of scales of the KV cache, from "SOURCE HALF" -> outcome."""
    refusals: dict[str, str] = {}
    cache_scales: str | None = "k_scale"
    for key, outcome in written.items():
        half = key.rpartition(" ")[2]
        if outcome.startswith("loads as "):
            cache_scales = outcome.removeprefix("loads as ")
        else:
            refusals.setdefault(half, outcome)
    return refusals, None if "cache" in refusals else cache_scales
