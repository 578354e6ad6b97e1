"""One weight format as data: what of compressed-tensors' `QuantizationArgs` changes bytes.

Spelled as compressed-tensors spells it, so that nothing has to be translated. Which tensor gets
which scheme is the plan's business; what happens to activations is not said here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

# A weight is seen once, so these observers all come to its plain minimum and maximum
MINMAX = (None, "memoryless_minmax", "static_minmax", "minmax")

KNOWN = (
    *("num_bits", "type", "strategy", "symmetric", "group_size", "block_structure"),
    *("scale_dtype", "zp_dtype", "dynamic", "actorder", "observer", "observer_kwargs"),
)


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

    @classmethod
    def from_args(
        cls, args: Mapping[str, object], format: str, *, stored: bool = False
    ) -> WeightScheme:
        """The scheme of a `QuantizationArgs`, given as the dict of YAML, JSON or `model_dump()`.

        `stored` says that the weights exist already, so that it no longer matters how their scales
        were found (the observer, GPTQ's activation order). "naive-quantized" becomes the format
        with the same bytes. `PlanError` names a field that is unknown or asks for what is not done.
        """
        for field in args:
            want("field", field, KNOWN)
        want("dynamic", args.get("dynamic"), [None, False])
        orders = [None, False, "weight", "static"] if stored else [None, False]
        want("actorder", word(args.get("actorder")), orders)
        if not stored:
            want("observer", args.get("observer"), MINMAX)
        symmetric = args.get("symmetric", True)
        want("symmetric", symmetric, [True, False])
        if not symmetric:
            want("zp_dtype", torch_name(args.get("zp_dtype")), [None, "None", "int8"])
        group_size = whole("group_size", args.get("group_size"))
        type = str(word(args.get("type", "int")))
        return cls(
            format=NAIVE.get(type, format) if format == "naive-quantized" else format,
            num_bits=whole("num_bits", args.get("num_bits", 8)) or 0,
            type=type,
            strategy=str(word(args.get("strategy")) or implied_strategy(group_size)),
            symmetric=bool(symmetric),
            group_size=None if group_size == -1 else group_size,
            block_structure=pair(args.get("block_structure")),
            scale_dtype=torch_name(args.get("scale_dtype")),
        )

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
        return " ".join(words if self.symmetric else [*words, "asym"])


def want(field: str, found: object, wanted: Collection[object]) -> None:
    """`PlanError` unless `found` is one of `wanted`."""
    if found not in wanted:
        choice = ", ".join(map(repr, wanted))
        raise PlanError(f"unsupported weights.{field} {found!r}; expected {choice}")


def word(value: object) -> object:
    """The plain string of an enum member or a name in capitals; anything else as it is."""
    plain = getattr(value, "value", value)
    return plain.lower() if isinstance(plain, str) else plain


def whole(field: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value == 0 or value < -1:
        raise PlanError(f"weights ask for {field} {value!r}; wanted a positive whole number")
    return value


def pair(value: object) -> tuple[int, int] | None:
    """[128, 128] or the older spelling "128x128"."""
    if value is None:
        return None
    sides = value.split("x") if isinstance(value, str) else value
    if (
        isinstance(sides, list | tuple)
        and len(sides) == 2
        and all(str(n).isdecimal() for n in sides)
    ):
        rows, columns = int(sides[0]), int(sides[1])
        if rows and columns:
            return rows, columns
    raise PlanError(f"weights ask for block_structure {value!r}; wanted two positive whole numbers")


def torch_name(value: object) -> str | None:
    """torch.uint8 and "torch.uint8" -> "uint8"."""
    return None if value is None else str(value).removeprefix("torch.")


def implied_strategy(group_size: int | None) -> str:
    """What compressed-tensors assumes when a recipe names no strategy."""
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"
