"""One weight format as data: what of compressed-tensors' `QuantizationArgs` changes bytes.

Spelled as compressed-tensors spells it, so that nothing has to be translated. Which tensor gets
which scheme is the plan's business; what happens to activations is not said here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ckptq.errors import PlanError


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """What one of compressed-tensors' formats can hold."""

    type: str
    bits: Collection[int]
    strategies: Collection[str]
    asymmetric: bool = False
    group_size: int | None = None
    """The only group size, where the format fixes it."""
    scale_dtype: str | None = None
    """torch's name of the scales' dtype; None is the dtype of the weight."""
    short: str


FORMATS = {
    "float-quantized": Format(
        type="float", bits=(8,), strategies=("tensor", "channel", "group", "block"), short="fp"
    ),
    "int-quantized": Format(
        type="int", bits=range(2, 9), strategies=("tensor", "channel", "group"), asymmetric=True,
        short="int",
    ),
    "pack-quantized": Format(
        type="int", bits=range(2, 9), strategies=("channel", "group"), asymmetric=True, short="int"
    ),
    "mxfp8-quantized": Format(
        type="float", bits=(8,), strategies=("group",), group_size=32, scale_dtype="uint8",
        short="mxfp",
    ),
    "mxfp4-pack-quantized": Format(
        type="float", bits=(4,), strategies=("group",), group_size=32, scale_dtype="uint8",
        short="mxfp",
    ),
    "nvfp4-pack-quantized": Format(
        type="float", bits=(4,), strategies=("tensor_group",), group_size=16,
        scale_dtype="float8_e4m3fn", short="nvfp",
    ),
}  # fmt: skip

# What compressed-tensors calls these two when activations are not quantized
NAIVE = {"float": "float-quantized", "int": "int-quantized"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """Ranges of which each tile gets the one with the least error, sum |dequantized - w|^norm.

    They are `expand` times the tile's own, and shares of it in steps of 1 / `grid`, down to
    1 - `maxshrink`. Names and defaults are those of llm-compressor's `memoryless_mse`.
    """

    expand: float = 1.0
    maxshrink: float = 0.20
    grid: float = 100.0
    norm: float = 2.4

    @property
    def shares(self) -> tuple[float, ...]:
        """What the expanded range is multiplied by, from 1 down."""
        return tuple(1 - step / self.grid for step in range(int(self.maxshrink * self.grid)))


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightScheme:
    """One weight format. `PlanError` when its fields do not fit together.

    Example: `WeightScheme(format="pack-quantized", num_bits=4, type="int", strategy="group",
    group_size=128)` is compressed-tensors' W4A16.
    """

    format: str
    num_bits: int
    type: str
    strategy: str
    symmetric: bool = True
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    scale_dtype: str | None = None
    """torch's name of the scales' dtype if the format fixes it; None is the weight's own."""
    search: Search | None = None
    """How ranges are chosen; None takes the minimum and maximum of each tile."""

    def __post_init__(self) -> None:
        want("format", self.format, FORMATS)
        held = FORMATS[self.format]
        want("type", self.type, [held.type])
        want("num_bits", self.num_bits, held.bits)
        want("strategy", self.strategy, held.strategies)
        want("symmetric", self.symmetric, [True, False] if held.asymmetric else [True])
        want("scale_dtype", self.scale_dtype, [held.scale_dtype])
        if held.group_size is not None:
            want("group_size", self.group_size, [held.group_size])
        if (self.group_size is not None) != (self.strategy in ("group", "tensor_group")):
            raise PlanError(
                f"strategy {self.strategy!r} does not go with group_size {self.group_size}"
            )
        if (self.block_structure is not None) != (self.strategy == "block"):
            found = self.block_structure
            raise PlanError(f"strategy {self.strategy!r} does not go with block_structure {found}")
        if self.search is not None and self.strategy == "tensor":
            raise PlanError("one scale per tensor is not searched for; expected observer minmax")

    @property
    def codes(self) -> str:
        """Local name of the tensor that holds the codes."""
        return "weight_packed" if "pack" in self.format else "weight"

    @property
    def half_range(self) -> float:
        """What the largest magnitude is divided by: 448 for E4M3, 127.5 for int8, 7.5 for int4."""
        return 448.0 if self.type == "float" else (2**self.num_bits - 1) / 2

    def __str__(self) -> str:
        """Short, for tables: "fp8 channel", "int4 group 128 asym", "nvfp4"."""
        held = FORMATS[self.format]
        words = [f"{held.short}{self.num_bits}"]
        if held.group_size is None:
            words.append(self.strategy)
            words += [str(self.group_size)] if self.group_size else []
            words += ["x".join(map(str, self.block_structure))] if self.block_structure else []
        words += [] if self.symmetric else ["asym"]
        return " ".join(words if self.search is None else [*words, "searched"])


def want(field: str, found: object, wanted: Collection[object]) -> None:
    """`PlanError` unless `found` is one of `wanted`."""
    if found not in wanted:
        choice = ", ".join(map(repr, wanted))
        raise PlanError(f"unsupported weights.{field} {found!r}; expected {choice}")
