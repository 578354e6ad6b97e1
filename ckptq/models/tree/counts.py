"""Limits on the number of modules in a config, checked before any are built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import SourceError

MOST = {"expert": 1 << 16, "layer": 1024, "block": 1024, "depth": 1024, "stage": 1024}
"""Part of a name -> how many there may be: the deepest models have 200 layers, Doge 16,384 experts
of a row each."""

SIZE = re.compile(r"size|dim|width|length|position|token|window|cutoff|block_sparse|seq", re.I)
"""Names that contain such a word but do not count modules."""


def check_counts(ckpt: Checkpoint) -> None:
    """SourceError for an implausible number of layers or experts, which would exhaust memory."""
    check_config(str(ckpt.path / CONFIG), ckpt.config)


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """The same for a config from anywhere."""
    for key, value in _numbers(config):
        most = next((most for part, most in MOST.items() if part in key.lower()), value)
        if value > most and not SIZE.search(key):
            raise SourceError(f"{where}: {key} is {value:,}; no model has more than {most:,}")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number under a name, in objects within objects too."""
    todo: list[Mapping[str, Any]] = [config]
    while todo:
        for key, value in todo.pop().items():
            if isinstance(value, Mapping):
                todo.append(value)
            elif type(value) in (int, float):
                yield str(key), value
