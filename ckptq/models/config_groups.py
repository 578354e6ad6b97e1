"""The config groups of a checkpoint that is quantized already, and which Linear falls to which.

For commands that have to rely on them: what is odd is an error. `ckptq verify` reads the same data
with `ckptq.verify.declared`, which makes findings of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import SourceError
from ckptq.patterns import BadPattern, compiled, matches


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigGroup:
    """One entry of `config_groups` that quantizes weights."""

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    input_activations: Mapping[str, Any]
    """Empty where inputs are not quantized."""
    format: str | None
    """None where the format of the whole config holds."""


def stored_groups(ckpt: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Every entry of `config_groups` as it is written, those for attention included."""
    groups = (ckpt.quantization_config or {}).get("config_groups") or {}
    found = _object(ckpt, "config_groups", groups)
    return {name: _object(ckpt, f"config_groups.{name}", group) for name, group in found.items()}


def config_groups(ckpt: Checkpoint) -> tuple[ConfigGroup, ...]:
    """Those that quantize weights. SourceError names the field that is not what it should be."""
    made = []
    for name, group in stored_groups(ckpt).items():
        if not group.get("weights"):
            continue
        where = f"config_groups.{name}"
        form = group.get("format")
        made.append(
            ConfigGroup(
                name=name,
                targets=_patterns(ckpt, f"{where}.targets", group.get("targets")),
                weights=_object(ckpt, f"{where}.weights", group["weights"]),
                input_activations=_object(
                    ckpt, f"{where}.input_activations", group.get("input_activations") or {}
                ),
                format=None if form is None else str(form),
            )
        )
    return tuple(made)


def group_of(groups: Sequence[ConfigGroup], module: str) -> ConfigGroup | None:
    """As vLLM finds it: the first whose target is the name or a pattern, else the class."""
    named = (g for g in groups if any(matches(target, module) for target in g.targets))
    by_class = (g for g in groups if "Linear" in g.targets)
    return next(named, None) or next(by_class, None)


def block_structure(ckpt: Checkpoint) -> tuple[int, int] | None:
    """`weight_block_size` of quant_method fp8: rows and columns of a block."""
    found = (ckpt.quantization_config or {}).get("weight_block_size")
    if not found:
        return None
    if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    raise _odd(ckpt, "weight_block_size", found, "two whole numbers")


def _patterns(ckpt: Checkpoint, field: str, found: object) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
        raise _odd(ckpt, field, found, "a list of names")
    for pattern in found:
        try:
            compiled(pattern)
        except BadPattern as error:
            raise _odd(ckpt, field, pattern, f"a pattern that compiles ({error})") from error
    return tuple(found)


def _object(ckpt: Checkpoint, field: str, found: object) -> Mapping[str, Any]:
    if isinstance(found, Mapping):
        return found
    raise _odd(ckpt, field, found, "an object")


def _odd(ckpt: Checkpoint, field: str, found: object, wanted: str) -> SourceError:
    return SourceError(
        f"{ckpt.path / CONFIG}: quantization_config.{field} is {found!r}, wanted {wanted}"
    )
