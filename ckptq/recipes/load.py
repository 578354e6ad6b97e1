"""Read recipes: ours by name, compressed-tensors presets by name, a user's YAML by llm-compressor.

The built-in files spell everything out and are checked against llm-compressor's own models by a
test, so that running one does not wait for its import (5 s). The rest goes through them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ckptq.errors import UsageError
from ckptq.files import read_small
from ckptq.patterns import BadPattern, compiled
from ckptq.recipes.dialect import QUANTIZES, read_modifiers
from ckptq.recipes.preset import EMPTY, preset_text

FOLDER = Path(__file__).parent

RECIPE_BYTES = 1 << 20
"""Of a recipe of the user's own; the largest that are known have 10 kB."""

Args = Mapping[str, Any]
"""A compressed-tensors QuantizationArgs as plain data, without the fields that are null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One entry of `config_groups`: which modules, and how."""

    name: str
    targets: tuple[str, ...]
    weights: Args | None = None
    input_activations: Args | None = None
    output_activations: Args | None = None
    format: str | None = None

    @property
    def is_attention(self) -> bool:
        """A group that has activations but no weights quantizes q, k and v inside attention."""
        return self.weights is None and self.input_activations is not None

    @property
    def input_scale(self) -> str | None:
        """Local name of the scale that its Linears need for inputs, which only calibration gives.

        NVFP4's inputs have scales per group, found as they come ("local"), under one global scale.
        """
        inputs = self.input_activations if self.weights is not None else None
        if inputs is None or inputs.get("dynamic", False) is True:
            return None
        return "input_global_scale" if inputs.get("dynamic") == "local" else "input_scale"

    @property
    def largest_input(self) -> float:
        """What the largest static input is scaled to: 448 for FP8, half the steps for integers,
        448 * 6 for NVFP4: the largest scale of a group by the largest code."""
        inputs = self.input_activations or {}
        if inputs.get("type", "int") == "float":
            return 448.0 * 6.0 if inputs.get("dynamic") == "local" else 448.0
        return float(2 ** int(inputs.get("num_bits", 8)) - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a recipe asks for, resolved: presets spelled out, scheme names gone."""

    name: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    kv_cache_scheme: Args | None = None
    handed_over: tuple[str, ...] = ()
    """Modifiers that llm-compressor has to run itself, by class name."""
    text: str
    """The recipe as YAML in llm-compressor's dialect; kept with the output."""

    @property
    def attention(self) -> Args | None:
        """How q, k and v are quantized in attention and cache, if they are."""
        inputs = next((g.input_activations for g in self.groups if g.is_attention), None)
        return inputs or self.kv_cache_scheme


def built_in() -> dict[str, Path]:
    """The recipes that come with ckptq, by scheme name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_scheme(name: str) -> Recipe:
    """`--scheme NAME`: a built-in recipe, or a compressed-tensors preset (FP8_DYNAMIC)."""
    files = built_in()
    if name.lower() in files:
        text = files[name.lower()].read_text()
        return _plain(name.lower(), text)
    from compressed_tensors.quantization import is_preset_scheme

    if is_preset_scheme(name):
        return load_text(name.upper(), preset_text(name.upper()))
    raise UsageError(
        f"unknown scheme {name!r}; built in: {', '.join(files)}; compressed-tensors' presets "
        "(FP8_DYNAMIC, W4A16, ...) are accepted too; `ckptq recipes` lists all"
    )


def load_either(scheme: str | None, file: Path | None) -> Recipe:
    """What `--scheme` or `--recipe` names. UsageError for both, or neither."""
    if (scheme is None) == (file is None):
        raise UsageError("give either --scheme NAME or --recipe FILE; `ckptq recipes` lists names")
    return load_recipe(file) if file is not None else load_scheme(str(scheme))


def describe() -> dict[str, str]:
    """Every name that `--scheme` takes, with a line on what it does."""
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    ours = {name: _first_comment(path) for name, path in built_in().items()}
    presets = {name: "compressed-tensors preset" for name in PRESET_SCHEMES if name != EMPTY}
    return ours | presets


def _first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


def load_recipe(file: Path) -> Recipe:
    """`--recipe FILE`: a recipe in llm-compressor's dialect."""
    data = read_small(file, RECIPE_BYTES)
    try:
        return load_text(file.stem, data.decode("utf-8").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not a text file: {error}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def load_text(name: str, text: str) -> Recipe:
    """Parse with llm-compressor's own models, so that a typo fails with its field named."""
    modifiers, configs = read_modifiers(text)
    kinds = [type(modifier).__name__ for modifier in modifiers]
    others = tuple(kind for kind in kinds if kind != QUANTIZES)
    if not modifiers:
        raise UsageError(
            "the recipe holds no modifier; wanted a stage of modifiers, as `ckptq recipes NAME` has"
        )
    if len(configs) > 1:
        raise UsageError(
            f"{len(configs)} modifiers quantize; one with several config_groups is wanted"
        )
    groups: tuple[Group, ...] = ()
    kv = None
    ignore: tuple[str, ...] = ()
    if configs:
        config = configs[0]
        groups = tuple(
            group
            for key, scheme in config.config_groups.items()
            if (group := _resolved_group(key, scheme)) is not None
        )
        kv = _dump(config.kv_cache_scheme)
        ignore = tuple(config.ignore or ())
    check_patterns("ignore", ignore)
    for group in groups:
        check_patterns(f"group {group.name!r}: target", group.targets)
    return Recipe(
        name=name, groups=groups, ignore=ignore, kv_cache_scheme=kv, handed_over=others, text=text
    )


def check_patterns(what: str, patterns: Iterable[str]) -> None:
    """UsageError for a `re:` pattern that is no regular expression."""
    for pattern in patterns:
        try:
            compiled(pattern)
        except BadPattern as error:
            raise UsageError(f"{what} {pattern!r}: not a regular expression: {error}") from error


def _resolved_group(name: str, scheme: Any) -> Group | None:
    """A pydantic QuantizationScheme as a Group; None where it asks for nothing."""
    weights, inputs = _dump(scheme.weights), _dump(scheme.input_activations)
    outputs = _dump(scheme.output_activations)
    if not (weights or inputs or outputs):
        return None
    return Group(
        name=name,
        targets=tuple(scheme.targets),
        weights=weights,
        input_activations=inputs,
        output_activations=outputs,
        format=_format(scheme),
    )


def _format(scheme: Any) -> str:
    """The stored format: the recipe's own, else the one that compressed-tensors infers."""
    if scheme.format is not None:
        return str(getattr(scheme.format, "value", scheme.format))
    if scheme.weights is None:
        return "dense"
    from compressed_tensors.compressors.format import infer_module_format
    from torch.nn import Linear

    return str(infer_module_format(Linear, scheme).value)


def _dump(args: Any) -> Args | None:
    """A pydantic QuantizationArgs as plain data, nulls and empty dicts left out."""
    if args is None:
        return None
    dumped = args.model_dump(mode="json", exclude_none=True)
    return {key: value for key, value in dumped.items() if value is not None and value != {}}


def _plain(name: str, text: str) -> Recipe:
    """One of our own files: already resolved."""
    stages = yaml.safe_load(text)
    modifier = stages["quantization_stage"]["quantization_modifiers"]["QuantizationModifier"]
    return Recipe(
        name=name,
        groups=tuple(
            Group(name=key, **{**group, "targets": tuple(group["targets"])})
            for key, group in modifier["config_groups"].items()
        ),
        ignore=tuple(modifier.get("ignore", ())),
        kv_cache_scheme=modifier.get("kv_cache_scheme"),
        text=text,
    )
