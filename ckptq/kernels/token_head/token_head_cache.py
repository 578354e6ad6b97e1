"""A paged cache of keys or values with one scale per token and head.

Shape letters: W bytes of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ckptq.kernels.token_head.kv_format import KVFormat, Rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenHeadCache:
    """Keys or values of a paged cache, as one format holds them."""

    fmt: KVFormat
    rotation: Rotation
    head_dim: int
    code: Tensor
    """uint8, [blocks, tokens, heads, W]."""
    scale: Tensor
    """fp32, the same without the last axis."""
    zero: Tensor | None
    """uint8, shaped as the scales; only of asymmetric formats."""

    def __post_init__(self) -> None:
        """Raise ValueError unless the three tensors are those of one cache."""
        shape = self.code.shape[:-1]
        wanted = (shape, None if not self.fmt.asymmetric else shape)
        found = (self.scale.shape, None if self.zero is None else self.zero.shape)
        if found != wanted or self.code.shape[-1] != self.fmt.width(self.head_dim):
            shapes = [list(self.code.shape), *(None if s is None else list(s) for s in found)]
            raise ValueError(f"codes, scales, zero points of {self.fmt.name}: {shapes}")
        if self.code.stride(-1) != 1:
            raise ValueError(f"the bytes of a head lie apart: strides {self.code.stride()}")
        if self.zero is not None and self.zero.stride() != self.scale.stride():
            raise ValueError("zero points and scales must be laid out alike")

    @classmethod
    def empty(
        cls,
        fmt: KVFormat,
        blocks: int,
        block: int,
        heads: int,
        head_dim: int,
        *,
        device: torch.device,
        rotation: Rotation | None = None,
    ) -> TokenHeadCache:
        """Room for blocks x block tokens. `rotation` replaces the format's own."""
        width, shape = fmt.width(head_dim), (blocks, block, heads)
        return cls(
            fmt=fmt,
            rotation=fmt.rotation if rotation is None else rotation,
            head_dim=head_dim,
            code=torch.zeros(*shape, width, dtype=torch.uint8, device=device),
            scale=torch.zeros(shape, device=device),
            zero=torch.zeros(shape, dtype=torch.uint8, device=device) if fmt.asymmetric else None,
        )
