"""The plan as data: units of work, what each reads and writes, and the shards they end in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import lcm

from ckptq.checkpoint.header import StoredTensor
from ckptq.models.encoded import Encoded
from ckptq.models.modules import Layout, Linear
from ckptq.models.quantized.kept_numbers import Kept
from ckptq.models.quantized.repacked import remade
from ckptq.permute.marks import Marks
from ckptq.permute.reordered import Reordered, Source
from ckptq.plan.attention import AttentionPlan
from ckptq.quantize.stored import row_quantum
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.declared import Declared
from ckptq.recipes.scheme import Recipe
from ckptq.spec import TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One Linear on its way: from its window on the source to the tensors of its format."""

    linear: Linear
    weight: Source
    """The Linear's own weight, or the same in another row order."""
    scheme: WeightScheme
    writes: Mapping[str, TensorSpec]
    """Local names: "weight", "weight_scale", ..."""
    kept: bool = False
    """Whether the source's codes and scales are written as they are, and nothing is quantized."""

    @property
    def quantum(self) -> int:
        """Where a block of rows may start: for what is read, and what is written."""
        return lcm(self.weight.quantum, row_quantum(self.scheme))

    @property
    def has_rows(self) -> bool:
        """Whether rows are made of it; those of a kept weight may all be copies."""
        return not self.kept or self.read_bytes > 0

    @property
    def read_bytes(self) -> int:
        """What is read of it beside the unit's copies."""
        weight = self.weight
        return _stored_bytes(
            remade(weight) if self.kept and isinstance(weight, Encoded) else weight
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """The smallest set of tensors that must be handled together.

    A norm is a unit of one copy. q/k/v under a per-tensor format are a unit of three parts, because
    they share one scale; gate and up of a fused expert are one of two, cut from one slab.
    """

    key: str
    rule: str
    """Which group quantizes it, or why it is left alone: what `--dry-run` shows."""
    copies: Mapping[str, StoredTensor] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """Of the copies, those whose numbers are looked at."""
    views: Mapping[str, Source] = field(default_factory=dict)
    """Cut out of a fused tensor, dequantized or reordered, and otherwise unchanged."""
    parts: tuple[Part, ...] = ()
    scales: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Made by calibration."""

    @property
    def writes(self) -> dict[str, TensorSpec]:
        """Every tensor that this unit puts into the output."""
        parts = {f"{p.linear.name}.{n}": spec for p in self.parts for n, spec in p.writes.items()}
        return {
            **{name: tensor.spec for name, tensor in self.copies.items()},
            **{name: view.written for name, view in self.views.items()},
            **parts,
            **self.scales,
        }

    @property
    def read_bytes(self) -> int:
        copies = sum(t.nbytes for t in self.copies.values())
        views = sum(map(_stored_bytes, self.views.values()))
        return copies + views + sum(part.read_bytes for part in self.parts)

    @property
    def write_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.writes.values())


def _stored_bytes(source: Source) -> int:
    weight = source.inner if isinstance(source, Reordered) else source
    return weight.nbytes if isinstance(weight, Encoded) else weight.spec.nbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The whole run, decided."""

    recipe: Recipe
    units: tuple[Unit, ...]
    """In output order, which is the source's order of bytes."""
    shards: Mapping[str, tuple[Unit, ...]]
    """File name -> the units in it. Names are final: the count is known."""
    groups: Mapping[str, tuple[str, ...]]
    """Group name -> the Linears that it quantizes."""
    inputs: Mapping[str, float]
    """Linears with a calibrated activation scale -> what their largest input becomes: 448, 127.5,
    448 * 6 for the global scale of NVFP4."""
    input_observer: str
    ignore: tuple[str, ...]
    """What was really left: the Linears that no group quantizes, by name."""
    attention: AttentionPlan | None
    layout: Layout
    marks: Marks = field(default_factory=dict)
    """RoPE orders that the output is marked with; empty where nothing was permuted."""
    told: tuple[str, ...] = ()
    """A line for each point in which the plan departs from the recipe, so that engines load it."""
    kept: Declared | None = None
    """Quantization config of a source whose weights are copied as they are stored, quantized."""

    @property
    def quantized(self) -> frozenset[str]:
        """Every Linear that a group quantizes."""
        return frozenset(name for names in self.groups.values() for name in names)

    @property
    def calibrated(self) -> bool:
        """Whether something of it is made by running the model: scales, or quantized weights."""
        return bool(self.attention or self.inputs or self.recipe.runs_layers)

    @property
    def read_bytes(self) -> int:
        return sum(u.read_bytes for u in self.units)

    @property
    def write_bytes(self) -> int:
        return sum(u.write_bytes for u in self.units)
