"""How one thing is quantized: weights, inputs, attention and its cache. compressed-tensors calls it
`QuantizationArgs`, and so do YAML recipes and config.json, from which it is read here alone.

A config may hold anything. Each invalid field goes to a `Problem`, which raises, or collects it and
lets reading continue.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptq.errors import PlanError
from ckptq.quantize.weight_scheme import NAIVE, Search, WeightScheme, want

Problem = Callable[[str, object, str], None]
"""Receives (field, value found, value expected)."""

LOCAL = "local"

# a weight is seen once, so all these observers give its minimum and maximum
MINMAX = (None, "memoryless_minmax", "static_minmax", "minmax")

_EXPANDED = Search(expand=1.8, maxshrink=1 - 0.8 / 1.8, grid=200.0)
SEARCHES = {
    "memoryless_mse": Search(),
    "mse": Search(),
    "nvfp4_expanded_mse": _EXPANDED,
    "fouroversix": _EXPANDED,
    "imatrix_mse": Search(maxshrink=0.95, grid=20.0, norm=3.0),
    "nvfp4_expanded_imatrix": _EXPANDED,
}
"""llm-compressor's observers of weights that search, with its defaults."""

WEIGHED = ("imatrix_mse", "nvfp4_expanded_imatrix")
"""Those in which a column counts as much as its inputs are large; all alike without inputs."""

UNUSED = ("patience", "triton_error_buffer", "averaging_constant")
"""Arguments of those observers without effect here: every step is tried, of a weight seen once."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """One `QuantizationArgs`, with compressed-tensors' names and defaults."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    """-1 is the whole row."""
    strategy: str = "tensor"
    block_structure: tuple[int, int] | None = None
    dynamic: bool | str = False
    actorder: bool | str | None = None
    scale_dtype: str | None = None
    """torch's name of the scales' dtype if the format fixes it, "uint8"."""
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    unknown: tuple[str, ...] = ()
    """Fields that compressed-tensors does not have."""
    odd: bool = False
    """Whether a field was invalid and has its default instead."""
    written: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """The fields that were read, in their order: they are written as they were."""

    @classmethod
    def read(cls, found: object, where: str = "weights", problem: Problem | None = None) -> Args:
        """From YAML, JSON or `model_dump()`; nulls and empty objects are ignored.

        Without a `problem`, PlanError names the field.
        """
        problem = problem or _refuse
        if not isinstance(found, Mapping):
            problem(where, found, "an object")
            return cls(odd=True)
        read: dict[str, Any] = {}
        odd = False
        for name, value in found.items():
            if value is None or value == {} or name not in FIELDS:
                continue
            reader, wanted = FIELDS[name]
            try:
                read[name] = reader(value)
            except ValueError:
                problem(f"{where}.{name}", value, wanted)
                odd = True
        size = read.get("group_size")
        implied = "tensor" if size is None else "channel" if size == -1 else "group"
        return cls(
            **{"strategy": implied, **read},
            unknown=tuple(str(name) for name in found if name not in FIELDS),
            odd=odd,
            written=tuple(read),
        )

    @property
    def local(self) -> bool:
        """NVFP4 inputs: dynamic group scales under a static global scale."""
        return self.dynamic == LOCAL

    @property
    def columns(self) -> int | None:
        """Columns that share a scale; None where no group of columns has its own."""
        return self.group_size if self.group_size != -1 else None

    @property
    def weighed(self) -> bool:
        """Whether the inputs of weights decide on their ranges."""
        return self.observer in WEIGHED

    def said(self, name: str) -> object:
        """A field as it was written; None where it was left out."""
        return getattr(self, name) if name in self.written or not self.written else None

    def replaced(self, fields: Mapping[str, Any], unsaid: Collection[str]) -> Args:
        """The same with these fields, written last; those that they stand for are said no more."""
        kept = tuple(name for name in self.written if name not in unsaid)
        return replace(self, **fields, written=(*kept, *fields) if self.written else ())

    def to_dict(self) -> dict[str, Any]:
        """As YAML and JSON hold it: what was read in its order, then what was changed since."""
        changed = [
            name
            for name in FIELDS
            if name not in self.written
            and (not self.written or getattr(self, name) != getattr(DEFAULT, name))
        ]
        made = {name: _plain(name, getattr(self, name)) for name in (*self.written, *changed)}
        return {name: value for name, value in made.items() if value is not None and value != {}}

    def weight_scheme(self, format: str, *, stored: bool = False) -> WeightScheme:
        """The part that determines the stored bytes, for weights in this format.

        `stored` means that the weights already exist, so that any observer will do. The order in
        which GPTQ takes columns changes no format. "naive-quantized" becomes the format with the
        same bytes. PlanError names an unknown or unsupported field.
        """
        for name in self.unknown:
            want("field", name, FIELDS)
        want("dynamic", self.dynamic, [False])
        want("actorder", self.actorder, [None, False, "weight", "static"])
        if not stored:
            want("observer", self.observer, (*MINMAX, *SEARCHES))
        if not self.symmetric:
            want("zp_dtype", self.zp_dtype, [None, "None", "int8"])
        return WeightScheme(
            format=NAIVE.get(self.type, format) if format == "naive-quantized" else format,
            num_bits=self.num_bits,
            type=self.type,
            strategy=self.strategy,
            symmetric=self.symmetric,
            group_size=self.columns,
            block_structure=self.block_structure,
            scale_dtype=self.scale_dtype,
            search=self._search_of_stored() if stored else self._search(),
        )

    def _search_of_stored(self) -> Search | None:
        """How ranges were chosen, as far as it is known here; verify tries it."""
        try:
            return self._search() if self.strategy != "tensor" else None
        except PlanError:
            return None

    def _search(self) -> Search | None:
        """How its observer chooses ranges; PlanError names an argument that it does not have."""
        search = SEARCHES.get(self.observer or "")
        if search is None:
            return None
        given = {k: v for k, v in self.observer_kwargs.items() if k not in UNUSED}
        for name, value in given.items():
            want("observer_kwargs", name, [*LIMITS, *UNUSED])
            least, most = LIMITS[name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PlanError(f"observer_kwargs.{name} is {value!r}, expected a number")
            if not least <= value <= most:
                raise PlanError(
                    f"observer_kwargs.{name} is {value!r}, expected {least:g} to {most:g}"
                )
        search = replace(search, **{name: float(value) for name, value in given.items()})
        if not search.shares:
            raise PlanError("observer_kwargs: maxshrink * grid is below 1, so no range is tried")
        return search


LIMITS = {"expand": (1.0, 100.0), "maxshrink": (0.0, 1.0), "grid": (1.0, 1e4), "norm": (0.1, 100.0)}
"""Arguments of a search, and what they may be."""


def _refuse(name: str, found: object, wanted: str) -> None:
    raise PlanError(f"unsupported {name} {found!r}; expected {wanted}")


def _plain(name: str, value: object) -> object:
    if name.endswith("_dtype") and value is not None:
        return f"torch.{value}"
    return list(value) if isinstance(value, tuple) else value


def _whole(value: object) -> int:
    if type(value) is int and value > 0:
        return value
    raise ValueError


def _word(value: object) -> str:
    """The plain string of an enum's member, or of a name in capitals."""
    plain = getattr(value, "value", value)
    if isinstance(plain, str):
        return plain.lower()
    raise ValueError


def pair(value: object) -> tuple[int, int]:
    """[128, 128] or the older spelling "128x128". ValueError for anything else."""
    sides = value.split("x") if isinstance(value, str) else value
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise ValueError
    rows, columns = (_whole(int(n) if str(n).isdecimal() else n) for n in sides)
    return rows, columns


def _dtype(value: object) -> str:
    """torch.uint8 and "torch.uint8" -> "uint8"."""
    return str(value).removeprefix("torch.")


def _is(kind: type) -> Callable[[object], object]:
    def same(value: object) -> object:
        if isinstance(value, kind):
            return value
        raise ValueError

    return same


FIELDS: Mapping[str, tuple[Callable[[object], object], str]] = {
    "num_bits": (_whole, "a positive whole number"),
    "type": (_word, "'int' or 'float'"),
    "symmetric": (_is(bool), "true or false"),
    "group_size": (lambda n: -1 if n == -1 else _whole(n), "a positive whole number, or -1"),
    "strategy": (_word, "the name of a strategy"),
    "block_structure": (pair, "two positive whole numbers"),
    "dynamic": (lambda x: x if isinstance(x, bool) else _word(x), "true, false or 'local'"),
    "actorder": (lambda x: x if isinstance(x, bool) else _word(x), "the name of an order"),
    "scale_dtype": (_dtype, "a torch dtype"),
    "zp_dtype": (_dtype, "a torch dtype"),
    "observer": (_is(str), "the name of an observer"),
    "observer_kwargs": (_is(dict), "an object"),
}
"""Field -> what reads it, and what it is."""

DEFAULT = Args()
