"""Where a Linear's weight comes from: stored, stored quantized, or either with its rows reordered.

The three look alike to a plan and to the pipeline: `spec` [R, C], `quantum` (rows may be read from
multiples of it on), `streams` (whether they are runs of bytes), `stored` (what messages name).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.view import View
from ckptq.models.encoded import Encoded
from ckptq.rope_order import Heads
from ckptq.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Reordered:
    """A q/k projection whose rows are wanted in half-split RoPE order, head by head."""

    inner: View | Encoded
    heads: Heads

    @property
    def spec(self) -> TensorSpec:
        return self.inner.spec

    @property
    def written(self) -> TensorSpec:
        return self.spec

    @property
    def stored(self) -> StoredTensor:
        return self.inner.stored

    @property
    def quantum(self) -> int:
        """Whole heads, because rows move within a head."""
        return lcm(self.inner.quantum, self.heads.head_dim)

    @property
    def index(self) -> int | None:
        return self.inner.index

    @property
    def streams(self) -> bool:
        return self.inner.streams

    @property
    def slab(self) -> tuple[object, ...]:
        return self.inner.slab

    @property
    def slab_bytes(self) -> int:
        return self.inner.slab_bytes


Weight = View | Encoded | Reordered
