"""A model class's map from names on disk to its own: what vLLM applies to `ignore` and targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rename = Callable[[str], str]


def renamer(rules: Mapping[str, Sequence[Any]]) -> Rename:
    """One function of the rules, applied in vLLM's order: regex, substr, prefix, suffix.

    vllm/model_executor/models/utils.py, `WeightsMapper._map_name_with_shard`. The first replaces
    every match, the others the first one; all rules of a kind are tried, one after the other.
    """
    patterns = [(re.compile(pattern), new) for pattern, new in rules.get("regex", ())]
    parts = rules.get("substr", ())
    prefixes = rules.get("prefix", ())
    suffixes = rules.get("suffix", ())

    def rename(name: str) -> str:
        for pattern, new in patterns:
            name = pattern.sub(new, name)
        for old, new in parts:
            name = name.replace(old, new, 1)
        for old, new in prefixes:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        for old, new in suffixes:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name

    return rename
