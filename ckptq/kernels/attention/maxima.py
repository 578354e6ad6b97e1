"""The per-head absolute maxima of q, k and v, which calibration turns into scales.

Shape letters: H query heads, K key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Maxima:
    """Three fp32 buffers that attention folds maxima into; a NaN seen anywhere stays."""

    q_H: Tensor
    k_K: Tensor
    v_K: Tensor

    @classmethod
    def zeros(cls, heads: int, kv_heads: int, device: torch.device | str = "cpu") -> Maxima:
        """Nothing seen yet."""
        return cls(*(torch.zeros(n, device=device) for n in (heads, kv_heads, kv_heads)))

    def check(self, heads: int, kv_heads: int, device: torch.device) -> None:
        """Raise ValueError unless these buffers fit this many heads on this device."""
        named = (("q", self.q_H, heads), ("k", self.k_K, kv_heads), ("v", self.v_K, kv_heads))
        for name, x, n in named:
            if x.shape != (n,) or x.dtype != torch.float32 or x.device != device:
                found = f"{x.dtype} {list(x.shape)} on {x.device}"
                raise ValueError(f"maxima of {name}: {found}, want float32 [{n}] on {device}")
