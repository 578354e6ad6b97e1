"""A scheme: which modules are quantized, and how their weights, inputs and caches are.

The one value that recipes and config.json are read into, that a plan decides by, and that the
output's config.json and recipe are written from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from ckptq.errors import PlanError
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.args import Args, Problem
from ckptq.recipes.names import Names, broken, read_names

A_PATTERN = "a regular expression"
"""Start of the `expected` text of a `Problem` about a pattern."""

PARTS = ("weights", "input_activations", "output_activations")


@dataclass(frozen=True, kw_only=True)
class Group:
    """One entry of `config_groups`: which modules, and how."""

    name: str
    targets: tuple[str, ...]
    weights: Args | None = None
    input_activations: Args | None = None
    output_activations: Args | None = None
    format: str | None = None
    unknown: Mapping[str, object] = field(default_factory=dict, compare=False)
    """Fields that compressed-tensors does not have."""

    @property
    def is_attention(self) -> bool:
        """A group that has activations but no weights quantizes q, k and v inside attention."""
        return self.weights is None and self.input_activations is not None

    @cached_property
    def named(self) -> Names:
        """What its targets mean by name."""
        return read_names(self.targets)

    @property
    def inputs(self) -> Args | None:
        """How the inputs of its Linears are quantized, if readable."""
        inputs = self.input_activations if self.weights is not None else None
        return None if inputs is None or inputs.odd else inputs

    @property
    def input_scale(self) -> str | None:
        """Local name of the calibrated input scale, if it has one."""
        if self.inputs is None or self.inputs.dynamic is True:
            return None
        return "input_global_scale" if self.inputs.local else "input_scale"

    @property
    def largest_input(self) -> float:
        """What the largest static input is scaled to: 448 for FP8, half the steps for integers,
        448 * 6 for NVFP4: the largest scale of a group by the largest code."""
        inputs = self.input_activations or Args()
        if inputs.type == "float":
            return 448.0 * 6.0 if inputs.local else 448.0
        return float(2**inputs.num_bits - 1) / 2

    @property
    def block_height(self) -> int:
        """Rows of weights that share a scale."""
        blocks = self.weights.block_structure if self.weights is not None else None
        return blocks[0] if blocks else 1

    def weight_scheme(self, *, stored: bool = False) -> WeightScheme:
        """The arithmetic's view of its weights; PlanError names the group."""
        try:
            return (self.weights or Args()).weight_scheme(self.format or "", stored=stored)
        except PlanError as error:
            raise PlanError(f"group {self.name!r}: {error}") from error

    @cached_property
    def scheme(self) -> WeightScheme | None:
        """That of already stored weights; None if the declaration is invalid."""
        if self.weights is None or self.weights.odd:
            return None
        try:
            return self.weight_scheme(stored=True)
        except PlanError:
            return None

    def to_dict(self) -> dict[str, Any]:
        """As `config_groups` holds it."""
        parts: dict[str, Args | None] = {part: getattr(self, part) for part in PARTS}
        return {
            "targets": list(self.targets),
            "format": self.format,
            **{part: None if args is None else args.to_dict() for part, args in parts.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Groups of modules, those that no group quantizes, and the cache."""

    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    kv_cache_scheme: Args | None = None

    @cached_property
    def linears(self) -> tuple[Group, ...]:
        """The groups that quantize Linears."""
        return tuple(group for group in self.groups if not group.is_attention)

    @property
    def attention(self) -> Args | None:
        """How q, k and v are quantized in attention and cache, if at all."""
        inputs = next((g.input_activations for g in self.groups if g.is_attention), None)
        return self.kv_cache_scheme if inputs is None else inputs

    @cached_property
    def ignored(self) -> Names:
        return read_names(self.ignore)

    def group_of(self, *names: str, of_class: Callable[[str], bool]) -> Group | None:
        """The group that a Linear falls to: by one of its names first, then by class.

        `of_class` says which targets are a class of it. Of several groups the first one counts.
        None for a Linear that is ignored or not targeted.
        """
        if self.ignored.match(*names):
            return None
        named = (g for g in self.linears if g.named.match(*names))
        by_class = (g for g in self.linears if any(map(of_class, g.targets)))
        return next(named, None) or next(by_class, None)


DEQUANTIZE, REPACK = "dequantize", "repack"
REPACK_NVFP4 = "repack-nvfp4"
"""As REPACK, with MXFP4 as NVFP4."""


DESCENTS = "descents"
"""The field of a `GPTQModifier` that llm-compressor does not have."""


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """How codes are chosen: llm-compressor's `GPTQModifier`, with its names and defaults.

    In which order columns are taken, `actorder`, stands in the `Args` of each group's weights.
    """

    block_size: int = 128
    """Columns after which the error is passed on to all others."""
    dampening_frac: float = 0.01
    """Added to the diagonal of the Hessian, as a share of its mean."""
    descents: int = 0
    """Passes of coordinate descent over codes and scales afterwards; llm-compressor has none."""

    def to_dict(self) -> dict[str, Any]:
        """As llm-compressor reads it, where nothing is said that it does not have."""
        said = asdict(self)
        return said if self.descents else {k: v for k, v in said.items() if k != DESCENTS}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How codes and scales are tuned by gradients: llm-compressor's `AutoRoundModifier`, with its
    names and defaults."""

    iters: int = 200
    """Steps a layer."""
    batch_size: int = 8
    """Samples a step."""
    lr: float | None = None
    """How far a step goes; None is 1 / `iters`."""
    enable_torch_compile: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Recipe(Scheme):
    """What a recipe asks for, resolved: presets spelled out, scheme names gone."""

    name: str
    gptq: Gptq | None = None
    """None rounds to the nearest code, unless `tuning` says otherwise."""
    tuning: Tuning | None = None
    conversion: str | None = None
    """DEQUANTIZE, REPACK or REPACK_NVFP4: it quantizes nothing, and a quantized source is written
    otherwise."""

    handed_over: tuple[str, ...] = ()
    """Modifiers that llm-compressor has to run itself, by class name."""
    text: str
    """The recipe as YAML in llm-compressor's dialect; kept with the output."""

    @property
    def repacks(self) -> bool:
        return self.conversion in (REPACK, REPACK_NVFP4)

    @property
    def runs_layers(self) -> bool:
        """Whether weights are quantized by their inputs, which the layers show when they run."""
        weighed = any(g.weights and g.weights.weighed for g in self.groups)
        return self.gptq is not None or self.tuning is not None or weighed

    @property
    def refits(self) -> bool:
        """Whether inputs decide on all scales, in the end."""
        return self.tuning is not None or (self.gptq is not None and self.gptq.descents > 0)

    @property
    def chooses(self) -> bool:
        """Whether GPTQ or AutoRound chooses codes, here or in llm-compressor; they need not be the
        nearest."""
        here = self.gptq is not None or self.tuning is not None
        return here or "GPTQModifier" in self.handed_over


def read_groups(entries: Mapping[str, Any], format: str | None, problem: Problem) -> list[Group]:
    """`config_groups` of a recipe or a config.json; `format` holds where a group has none."""
    groups = []
    for name, entry in entries.items():
        where = f"config_groups.{name}"
        if not isinstance(entry, Mapping):
            problem(where, entry, "an object")
            continue
        given = {part: entry[part] for part in PARTS if entry.get(part) is not None}
        own = entry.get("format") or format
        groups.append(
            Group(
                name=name,
                targets=read_strings(entry.get("targets"), f"{where}.targets", problem),
                format=None if own is None else str(own),
                unknown={k: v for k, v in entry.items() if k not in ("targets", "format", *PARTS)},
                **{part: Args.read(a, f"{where}.{part}", problem) for part, a in given.items()},
            )
        )
    return groups


def read_strings(found: object, where: str, problem: Problem) -> tuple[str, ...]:
    """Names and patterns. Other values are left out; an invalid pattern is kept."""
    if not isinstance(found, list):
        problem(where, found, "a list of names")
        return ()
    names = []
    for entry in found:
        if not isinstance(entry, str):
            problem(where, entry, "a name")
            continue
        if (why := broken(entry)) is not None:
            problem(where, entry, f"{A_PATTERN} ({why})")
        names.append(entry)
    return tuple(names)
