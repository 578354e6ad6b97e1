"""Changes of a `quantization_config`, wherever it stands in config.json."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptq.checkpoint.open import Checkpoint
from ckptq.mend.case import Case
from ckptq.mend.repair import Repair

PLACES = (("quantization_config",), ("text_config", "quantization_config"), ("compression_config",))
"""In the order in which engines look."""


def edited(
    case: Case,
    code: str,
    said: str,
    change: Callable[[dict[str, Any]], None],
    where: str | None = None,
) -> Iterator[Repair]:
    """The repair that changes the quantization_config so, if that changes anything."""
    ckpt = case.draft.ckpt
    own = copy.deepcopy(dict(ckpt.quantization_config or {}))
    change(own)
    if own != ckpt.quantization_config:
        yield Repair(code=code, where=where, said=said, config=with_quantization(ckpt, own))


def with_quantization(ckpt: Checkpoint, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with another quantization_config."""
    path = next((p for p in PLACES if _at(ckpt.config, p)), PLACES[0])
    return with_field(ckpt.config, path, quantization)


def with_field(config: Mapping[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A copy in which one field has another value."""
    key, *rest = path
    if not rest:
        return {**config, key: value}
    inner = config.get(key)
    return {
        **config,
        key: with_field(inner if isinstance(inner, Mapping) else {}, tuple(rest), value),
    }


def without_field(config: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A copy without one field."""
    key, *rest = path
    if not rest:
        return {k: v for k, v in config.items() if k != key}
    inner = config.get(key)
    if not isinstance(inner, Mapping):
        return dict(config)
    return {**config, key: without_field(inner, tuple(rest))}


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> object:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
