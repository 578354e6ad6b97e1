"""A 2-D window on a stored tensor: one Linear's weight, wherever and however it is laid out.

Shape letters: R rows (out), C columns (in), E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_range
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
    """Along the stored axes, before the transpose; None is all of them."""
    transposed: bool = False

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
        """Whether runs of its rows are runs of bytes, so that no slab has to be held."""
        dense = self.rows is None or self.rows.step == 1
        return dense and self.columns is None and not self.transposed

    @property
    def slab(self) -> tuple[StoredTensor, int | None]:
        """What has to be read whole where the view does not stream; gate and up share one."""
        return self.stored, self.index

    @property
    def slab_bytes(self) -> int:
        if self.streams:
            return 0
        return self.stored.nbytes // (1 if self.index is None else self.stored.spec.shape[0])


def read_rows(files: Files, view: View, start: int, stop: int) -> Tensor:
    """Rows start..stop of a view that streams, as [stop - start, C]."""
    assert view.streams
    stored = view.stored
    first = view.rows.start if view.rows is not None else 0
    if view.index is None:
        return read_range(files, stored, first + start, first + stop)
    matrix = StoredTensor(
        stored.name,
        TensorSpec(stored.spec.dtype, stored.spec.shape[1:]),
        stored.file,
        stored.offset + view.index * (stored.nbytes // stored.spec.shape[0]),
    )
    return read_range(files, matrix, first + start, first + stop)


def read_slab(files: Files, view: View) -> Tensor:
    """The whole 2-D matrix that the view is a window on."""
    if view.index is None:
        return read_range(files, view.stored, 0, view.stored.spec.shape[0])
    return read_range(files, view.stored, view.index, view.index + 1)[0]


def window(slab: Tensor, view: View) -> Tensor:
    """The view's [R, C] as a strided window on its slab; copies nothing."""
    found = slab[_slice(view.rows), _slice(view.columns)]
    return found.t() if view.transposed else found


def _slice(span: range | None) -> slice:
    return slice(None) if span is None else slice(span.start, span.stop, span.step)
