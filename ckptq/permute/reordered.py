"""A stored tensor to be read with its rows in another order.

It has the interface of the `View` or `Encoded` weight that it wraps, so that one stage handles
weights, scales, packed codes, zero points and biases alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.view import View
from ckptq.models.encoded import Encoded
from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Effect, Move
from ckptq.rope_order import RopeOrder
from ckptq.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Reordered:
    """A tensor of q_proj, k_proj or their attention module, in the RoPE order `to`."""

    inner: View | Encoded
    effect: Effect
    to: RopeOrder
    written: TensorSpec
    """Dtype and shape in the output; `spec` is the same as a matrix."""

    @property
    def spec(self) -> TensorSpec:
        return self.inner.spec

    @property
    def stored(self) -> StoredTensor:
        return self.inner.stored

    @property
    def quantum(self) -> int:
        """Whole heads, because rows move within a head; all where rows share words."""
        if self.effect.move is Move.PACKED_ROWS:
            return self.spec.shape[0]
        return lcm(self.inner.quantum, self.effect.heads.head_dim)

    @property
    def streams(self) -> bool:
        return self.inner.streams

    @property
    def slab(self) -> tuple[object, ...]:
        return self.inner.slab

    @property
    def slab_bytes(self) -> int:
        return self.inner.slab_bytes

    def moved(self, x_RN: Tensor) -> Tensor:
        """A run of the inner's rows, from a multiple of `quantum` on, in the wanted order."""
        packed = self.effect.move is Move.PACKED_ROWS
        effect = self.effect if packed else self.effect.on_rows(len(x_RN))
        return permute_tensor(x_RN, effect, self.to)


Source = View | Encoded | Reordered
"""What the pipeline reads rows of."""


def reordered_tensor(stored: StoredTensor, effect: Effect, to: RopeOrder) -> Reordered:
    """A tensor of any number of dimensions, of which the first ones together count its rows."""
    packed = effect.move is Move.PACKED_ROWS
    rows = stored.spec.shape[0] if packed else effect.heads.rows
    matrix = TensorSpec(stored.spec.dtype, (rows, stored.spec.numel // rows))
    return Reordered(View(replace(stored, spec=matrix)), effect, to, stored.spec)
