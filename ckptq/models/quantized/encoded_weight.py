"""A Linear that is stored quantized: its stored tensors, its scheme, and its dequantized rows.

Whatever the format, rows come as compressed-tensors' own tensors (`parts`), of which
`ckptq.quantize` makes weights.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_range, read_tensor
from ckptq.errors import SourceError
from ckptq.quantize.stored import quantum_specs, row_quantum, stored_span
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

Take = Callable[[StoredTensor], "Tensor"]
"""Gives a stored tensor that is in memory, on any device; it is not to be written to."""

Held = Mapping[str, "Tensor"]
"""Stored tensors by local name, as they are on disk."""

CODES = ("weight_packed", "weight", "qweight")

HALF_MOST = 65504


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A quantized Linear on disk: its stored tensors by local name, and its scheme."""

    name: str
    tensors: Mapping[str, StoredTensor] = field(hash=False)
    scheme: WeightScheme
    spec: TensorSpec
    """Of the weight [R, C] once it is dequantized."""
    input_scale: StoredTensor | None = field(default=None, hash=False)
    """Of its static inputs, where they have one."""
    index: None = None
    streams: ClassVar[bool] = True
    """As for a `View`: its rows are runs of bytes, and it is not part of a 3-D tensor."""
    fused: ClassVar[bool] = False
    """Whether it stands for all experts of a layer in one tensor, and is no Linear."""

    @property
    def written(self) -> TensorSpec:
        return self.spec

    @property
    def plain(self) -> str:
        """Name of the dequantized tensor."""
        return f"{self.name}.weight"

    @property
    def stored(self) -> StoredTensor:
        """The tensor that holds the codes: what an error message names."""
        return next(self.tensors[name] for name in CODES if name in self.tensors)

    @property
    def slab(self) -> tuple[StoredTensor, None]:
        return self.stored, None

    @property
    def slab_pieces(self) -> tuple[StoredTensor, ...]:
        """What has to be in memory before any rows are made."""
        return ()

    @property
    def slab_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.slab_pieces)

    @property
    def shape(self) -> tuple[int, int]:
        R, C = self.spec.shape
        return R, C

    @property
    def quantum(self) -> int:
        """Runs of rows must start at a multiple of this."""
        return row_quantum(self.scheme)

    def dims(self, local: str) -> int:
        """Dimensions of a stored tensor; one that has a single one has no rows of its own."""
        spec = quantum_specs(self.scheme, self.shape[1]).get(local)
        return len(spec.shape) if spec is not None else 1

    def span(self, local: str, start: int, stop: int) -> tuple[int, int]:
        """The rows of a stored tensor that hold rows start..stop of the weight."""
        return stored_span(local, self.scheme, self.shape[1], start, stop)

    def read(self, files: Files, start: int, stop: int) -> dict[str, Tensor]:
        """Everything stored for rows start..stop; start is a multiple of the quantum."""
        held = {}
        for local, tensor in self.tensors.items():
            if self._has_rows(local):
                held[local] = read_range(files, tensor, *self.span(local, start, stop))
            else:
                held[local] = self._lone(local, read_tensor(tensor, files))
        return held

    def whole(self, take: Take) -> dict[str, Tensor]:
        """As `read` of all rows, from stored tensors that `take` has."""
        taken = {local: take(tensor) for local, tensor in self.tensors.items()}
        return {n: t if self._has_rows(n) else self._lone(n, t) for n, t in taken.items()}

    def _has_rows(self, local: str) -> bool:
        return self.dims(local) > 1 and self.tensors[local].spec.numel > 1

    def _lone(self, local: str, tensor: Tensor) -> Tensor:
        """A single number in as many dimensions as a scale of this scheme has."""
        return tensor.reshape(-1, *(1,) * (self.dims(local) - 1))

    def decoded(self, parts: Mapping[str, Tensor], rows: int) -> Tensor:
        """What these parts of so many rows stand for, [rows, C], on their device."""
        from ckptq.quantize.dispatch import dequantize

        shape = (rows, self.shape[1])
        return dequantize(parts, self.scheme, shape, torch_dtype(self.spec.dtype))

    def why_not_repacked(self) -> str | None:
        """Why compressed-tensors' layout cannot hold the same numbers; None if it can."""
        return None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldWhole(Encoded):
    """A weight whose rows are no runs of bytes: output channels lie along the columns.

    All its tensors are held in memory, and the parts of rows are cut out of them.
    """

    streams: ClassVar[bool] = False

    @property
    def slab_pieces(self) -> tuple[StoredTensor, ...]:
        return tuple(self.tensors.values())

    def cut(self, held: Held, start: int, stop: int) -> dict[str, Tensor]:
        """The parts of rows start..stop, from whole stored tensors on any device; `start` is a
        multiple of the quantum."""
        raise NotImplementedError

    def read(self, files: Files, start: int, stop: int) -> dict[str, Tensor]:
        return self.cut(self.hold(files), start, stop)

    def whole(self, take: Take) -> dict[str, Tensor]:
        held = {local: take(tensor) for local, tensor in self.tensors.items()}
        return self.cut(held, 0, self.shape[0])

    def hold(self, files: Files) -> dict[str, Tensor]:
        """All stored tensors, in new memory."""
        return {local: read_tensor(tensor, files) for local, tensor in self.tensors.items()}


def decode_rows(files: Files, encoded: Encoded, start: int, stop: int) -> Tensor:
    """Rows start..stop of the weight, dequantized, [stop - start, C]; `start` on the quantum."""
    return decode(encoded, encoded.read(files, start, stop), stop - start)


def decode(encoded: Encoded, parts: Mapping[str, Tensor], rows: int) -> Tensor:
    """`Encoded.decoded`; SourceError for what float16 cannot hold."""
    w_RC = encoded.decoded(parts, rows)
    if encoded.spec.dtype == "F16" and not w_RC.isfinite().all():
        raise SourceError(
            f"{encoded.stored.file}: tensor {encoded.stored.name!r} decodes to weights beyond "
            f"{HALF_MOST}, the float16 maximum (config.json's dtype), or its scales are not finite"
        )
    return w_RC
