"""A 2-D window on a stored tensor: one Linear's weight, wherever and however it is laid out.

Shape letters: R rows (out), C columns (in), E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, Memory, read_range, read_tensor
from ckptq.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class View:
    """Entry `index` of a 3-D tensor (or a 2-D one as it is), some columns of it, maybe transposed.

    Example: Llama-4's `gate_up_proj` [E, H, 2I] holds the gate_proj of expert 3, which a Linear
    stores as [I, H], at `View(stored, index=3, columns=range(I), transposed=True)`.
    """

    stored: StoredTensor
    index: int | None = None
    rows: range | None = None
    columns: range | None = None
    """Along the stored axes, before the transpose; None means all."""
    transposed: bool = False
    vector: bool = False
    """A single row written without its first axis: the bias of one expert."""

    @property
    def written(self) -> TensorSpec:
        """Dtype and shape of the tensor that is made of it."""
        return TensorSpec(self.spec.dtype, self.spec.shape[1:]) if self.vector else self.spec

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape [R, C] of the window."""
        *_, rows, columns = self.stored.spec.shape
        shape = (
            rows if self.rows is None else len(self.rows),
            columns if self.columns is None else len(self.columns),
        )
        return TensorSpec(self.stored.spec.dtype, shape[::-1] if self.transposed else shape)

    @property
    def streams(self) -> bool:
        """Whether its rows are contiguous on disk, so that no slab has to be held."""
        dense = self.rows is None or self.rows.step == 1
        return dense and self.columns is None and not self.transposed

    @property
    def quantum(self) -> int:
        """Rows may be read starting anywhere."""
        return 1

    @property
    def slab(self) -> tuple[StoredTensor, int | None, int, int]:
        """The run of rows that has to be in memory whole if the view does not stream.

        Equal for views that are cut from the same bytes, as gate and up of one expert are.
        """
        rows = self.stored.spec.shape[-2]
        if self.rows is None or self.rows.step != 1:
            return self.stored, self.index, 0, rows
        return self.stored, self.index, self.rows.start, self.rows.stop

    @property
    def slab_pieces(self) -> tuple[StoredTensor, ...]:
        """The slab as a tensor of its own; empty where the view streams."""
        return () if self.streams else (_slab(self),)

    @property
    def slab_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.slab_pieces)


def read_rows(
    files: Files, view: View, start: int, stop: int, memory: Memory | None = None
) -> Tensor:
    """Rows start..stop of a view that streams, as [stop - start, C].

    With `memory`, the tensor is overwritten when the same thread uses that memory again.
    """
    assert view.streams
    first = view.rows.start if view.rows is not None else 0
    return read_range(files, _matrix(view), first + start, first + stop, memory)


def read_slab(files: Files, view: View) -> Tensor:
    """The whole slab, in new memory."""
    return read_tensor(_slab(view), files)


def window(slab: Tensor, view: View) -> Tensor:
    """The view's [R, C] as a strided window on its slab; copies nothing."""
    _, _, first, _ = view.slab
    rows = None if view.rows is None else slice(view.rows.start - first, None, view.rows.step)
    found = slab[rows or slice(None), _slice(view.columns)]
    return found.t() if view.transposed else found


def _slab(view: View) -> StoredTensor:
    """The rows of the slab, as if they were stored alone."""
    _, _, first, last = view.slab
    matrix = _matrix(view)
    rows, columns = matrix.spec.shape
    spec = TensorSpec(matrix.spec.dtype, (last - first, columns))
    at = matrix.offset + first * (matrix.nbytes // rows)
    return StoredTensor(matrix.name, spec, matrix.file, at, matrix.identity)


def _matrix(view: View) -> StoredTensor:
    """The 2-D tensor of which the view is a window, as if it were stored alone."""
    stored = view.stored
    if view.index is None:
        return stored
    return StoredTensor(
        stored.name,
        TensorSpec(stored.spec.dtype, stored.spec.shape[1:]),
        stored.file,
        stored.offset + view.index * (stored.nbytes // stored.spec.shape[0]),
        stored.identity,
    )


def _slice(span: range | None) -> slice:
    return slice(None) if span is None else slice(span.start, span.stop, span.step)
