"""The tiles of a weight, the elements that share one scale, as a view; and what is extreme in them.

Shape letters: R rows, C columns, G groups, L columns in a group; blocks of H x W make a grid M x N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ckptq.quantize.scheme import WeightScheme

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a float: the integer of that size."""


class NonFinite(ValueError):
    """The weight holds NaN or Inf. Whoever knows the tensor's name says which tensor."""


def tiled(w_RC: Tensor, scheme: WeightScheme) -> Tensor:
    """Tensor: [1, R*C]. Channel: [R, 1, C]. Group: [R, G, L]. Block: [M, H, N, W], filled up with
    zeros to whole blocks. All but blocks are along the last dimension."""
    if scheme.strategy == "tensor":
        return w_RC.reshape(1, -1)
    if scheme.block_structure is None:
        return w_RC.unflatten(1, (-1, scheme.group_size or w_RC.shape[1]))
    (R, C), (H, W) = w_RC.shape, scheme.block_structure
    if R % H or C % W:
        w_RC = pad(w_RC, (0, -C % W, 0, -R % H))
    return w_RC.unflatten(1, (-1, W)).unflatten(0, (-1, H))


def untiled(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Back to [R, C], without what `tiled` filled up."""
    if x.ndim < 4:
        return x.reshape(shape)
    return x.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]].contiguous()


def over_tiles(scale: Tensor, x: Tensor) -> Tensor:
    """One number a tile, shaped so that it broadcasts over the tiles `x`."""
    return scale[:, None, :, None] if x.ndim == 4 else scale[..., None]


def magnitude(x: Tensor) -> Tensor:
    """The largest absolute value of each tile, in the weight's dtype. `NonFinite` on NaN or Inf.

    Found among bit patterns: without their sign these order as the numbers do, Inf and NaN on
    top, and torch is several times faster at small integers than at bf16.
    """
    bits = x.view(BITS[x.itemsize])
    return _finite(_largest(bits & torch.iinfo(bits.dtype).max), x.dtype)


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """min(amin, 0) and max(amax, 0) of each tile, in the weight's dtype. `NonFinite` on NaN or
    Inf."""
    bits = x.view(BITS[x.itemsize])
    # with the sign bit flipped, what was negative is on top, and orders by magnitude
    below = _largest(bits ^ torch.iinfo(bits.dtype).min).clamp(min=0)
    above = _largest(bits).clamp(min=0)
    return -_finite(below, x.dtype), _finite(above, x.dtype)


def _largest(bits: Tensor) -> Tensor:
    return bits.amax(3).amax(1) if bits.ndim == 4 else bits.amax(-1)


def _finite(bits: Tensor, dtype: torch.dtype) -> Tensor:
    numbers = bits.view(dtype)
    if not numbers.isfinite().all():
        raise NonFinite("NaN or Inf")
    return numbers
