"""Parse a recipe in llm-compressor's dialect, and report errors in a line each.

The models' errors come from pydantic, from Python where a validator compares before it converts, or
quote the whole text. A user needs the field, what was found and what was expected.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import yaml

from ckptq.errors import UsageError
from ckptq.optional import require_llmcompressor

WANTED = "a mapping of stages to modifiers, as `ckptq recipes NAME` prints"
MOST_VALUES = 100_000
LONGEST = 100
"""Characters of a value that a message shows."""


@dataclass(frozen=True)
class Modifier:
    """One of a recipe."""

    kind: str
    """The class of llm-compressor that runs it."""
    fields: Mapping[str, Any]
    config: Any
    """What it quantizes to, as compressed-tensors' QuantizationConfig; None for nothing."""


def read_modifiers(text: str) -> tuple[Modifier, ...]:
    """The modifiers of a recipe, in order.

    llm-compressor is asked where one is not ours to run. UsageError with the field's path if it is
    invalid, and if it needs llm-compressor where that is not installed.
    """
    stages = read_stages(text)
    from pydantic import ValidationError

    from ckptq.recipes.dialect.modifiers import RUN_HERE

    try:
        named = list(_named(stages))
        foreign = [kind for kind, _ in named if kind not in RUN_HERE]
        if foreign:
            require_llmcompressor(f"its {foreign[0]}")
            _refuse_unknown(foreign)
            return tuple(_read_theirs(text))
        read = [(kind, RUN_HERE[kind].model_validate(fields)) for kind, fields in named]
        return tuple(Modifier(kind, each.model_dump(), each.resolved()) for kind, each in read)
    except ValidationError as error:
        wrong = "\n".join(_complaint(**each) for each in error.errors())
        raise UsageError(f"not a valid llm-compressor recipe: {wrong}") from error
    except (
        ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RecursionError,
    ) as error:  # fmt: skip
        places = "".join(f"{path}: " for path in _stumbled(stages))
        raise UsageError(f"not a valid llm-compressor recipe: {places}{error}") from error


def _named(stages: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(class, fields) of each modifier. What is no stage or group is passed over, as llm-compressor
    does, unless there are modifiers in it."""
    for stage, groups in stages.items():
        if not str(stage).endswith("_stage") or not isinstance(groups, dict):
            _refuse_modifiers(groups, str(stage), "stages", "_stage")
            continue
        for group, modifiers in groups.items():
            if not str(group).endswith("_modifiers") or not isinstance(modifiers, dict):
                _refuse_modifiers({group: modifiers}, str(group), "groups", "_modifiers")
                continue
            for kind, fields in modifiers.items():
                if not isinstance(fields, dict):
                    raise UsageError(
                        f"{stage}.{group}.{kind} is {fields!r}; expected a mapping of its fields"
                    )
                yield str(kind), fields


def _refuse_modifiers(value: object, name: str, what: str, ending: str) -> None:
    """UsageError for modifiers where none would be run."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if str(key).endswith("Modifier"):
            raise UsageError(
                f"{key} in {name!r} would not run: names of {what} end in {ending}, as "
                f"quantization{ending}"
            )
        _refuse_modifiers(inner, name, what, ending)


def _refuse_unknown(kinds: Sequence[str]) -> None:
    """UsageError for a modifier that there is none of."""
    from llmcompressor.modifiers.factory import ModifierFactory

    from ckptq.recipes.dialect.modifiers import RUN_HERE

    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    known = {*RUN_HERE, *ModifierFactory._main_registry, *ModifierFactory._registered_registry}
    known |= ModifierFactory._experimental_registry.keys()
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise UsageError(f"unknown modifier {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _read_theirs(text: str) -> Iterator[Modifier]:
    """By llm-compressor's own classes."""
    with redirect_stdout(sys.stderr):
        from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
        from llmcompressor.recipe import Recipe

        for modifier in Recipe.create_instance(text).modifiers:
            config = modifier.resolved_config if isinstance(modifier, QuantizationMixin) else None
            yield Modifier(type(modifier).__name__, modifier.model_dump(), config)


def read_stages(text: str) -> Mapping[str, Any]:
    """The recipe as data, JSON or YAML. UsageError with the line for what is neither."""
    try:
        stages = _parsed(text)
        size = _expanded(stages, {})
    except RecursionError as error:
        raise UsageError(f"nested too deeply; expected {WANTED}") from error
    if size > MOST_VALUES:
        raise UsageError(
            f"holds more than {MOST_VALUES:,} values, counting repeated ones; expected {WANTED}"
        )
    if not isinstance(stages, dict):
        found = "nothing" if stages is None else f"a {type(stages).__name__}"
        raise UsageError(f"holds {found}; expected {WANTED}")
    return stages


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
            raise UsageError(f"not valid YAML: {error}") from error


def _expanded(value: object, known: dict[int, int]) -> int:
    """How many values there are when every alias is written out; a few lines can make billions.

    An alias of something that it is part of has no end: RecursionError.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(each, known) for each in inner)
    return known[id(value)]


def _complaint(loc: Sequence[str | int], msg: str, input: object, **_: object) -> str:
    """One of pydantic's errors: "config_groups.mlp.weights.num_bits: ..., found 'four'"."""
    found = repr(input)
    found = found if len(found) <= LONGEST else found[: LONGEST - 3] + "..."
    return f"{'.'.join(map(str, loc))}: {msg}, found {found}"


def _stumbled(data: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The fields whose type a validator of compressed-tensors stumbles over: it compares a value,
    which may be a string, before anyone has looked at what it is."""
    from compressed_tensors.quantization import QuantizationArgs

    for key, value in data.items():
        if isinstance(value, dict):
            yield from _stumbled(value, f"{path}{key}.")
        elif key in QuantizationArgs.model_fields:
            try:
                QuantizationArgs.model_validate({key: value})
            except TypeError:
                yield f"{path}{key} is {value!r}"
            except ValueError:
                continue  # of the right type, but nothing without its neighbours
