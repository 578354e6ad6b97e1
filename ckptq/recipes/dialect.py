"""A recipe's text through llm-compressor's own models, and their complaints in a line each.

Those come as pydantic writes them for programmers, as Python's own where a validator compares
before it converts, or with the whole text inside. A user needs the field, what is there, and what
is wanted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import yaml

from ckptq.errors import UsageError

QUANTIZES = "QuantizationModifier"
"""The modifier that ckptq carries out itself."""

WANTED = "a mapping of stages to modifiers, as `ckptq recipes NAME` prints"
LONGEST = 100
"""Characters of a value that a message shows."""


def read_modifiers(text: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """(modifiers, resolved configs of those that quantize), as llm-compressor's objects.

    UsageError with the field's path for what it does not take.
    """
    stages = read_stages(text)
    # its log goes to what is stdout while it is imported, and that is for results
    with redirect_stdout(sys.stderr):
        from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
        from llmcompressor.recipe import Recipe
    from pydantic import ValidationError

    try:
        modifiers = Recipe.create_instance(text).modifiers
        configs = [m.resolved_config for m in modifiers if isinstance(m, QuantizationMixin)]
    except ValidationError as error:
        wrong = "\n".join(_complaint(**each) for each in error.errors())
        raise UsageError(f"not a recipe that llm-compressor reads: {wrong}") from error
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        places = "".join(f"{path}: " for path in _stumbled(stages))
        raise UsageError(f"not a recipe that llm-compressor reads: {places}{error}") from error
    return modifiers, configs


def read_stages(text: str) -> Mapping[str, Any]:
    """The recipe as data, JSON or YAML. UsageError with the line for what is neither."""
    try:
        stages = json.loads(text)
    except ValueError:
        try:
            stages = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"not valid YAML: {error}") from error
    if not isinstance(stages, dict):
        found = "nothing" if stages is None else f"a {type(stages).__name__}"
        raise UsageError(f"holds {found}; wanted {WANTED}")
    return stages


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
