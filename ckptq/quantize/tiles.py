"""The tiles of a weight, the elements that share one scale, as a view; and what is extreme in them.

Shape letters: R rows, C columns, G groups, L columns in a group; blocks of H x W make a grid M x N.
`x` is a weight as `tiled` shows it: [R, G, L], or [M, H, N, W] for strategy "block".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ckptq.quantize.scratch import Scratch, blocks
from ckptq.quantize.weight_scheme import WeightScheme

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a float: the integer of that size."""


class NonFinite(ValueError):
    """The weight holds NaN or Inf. Whoever knows the tensor's name says which tensor."""


def check_finite(x: Tensor) -> None:
    """`NonFinite` on NaN or Inf. On a GPU it makes the host wait."""
    if not x.isfinite().all():
        raise NonFinite("NaN or Inf")


def tiled(w_RC: Tensor, scheme: WeightScheme) -> Tensor:
    """A view, or a copy that is filled up with zeros to whole blocks. Where there are no groups, a
    row is one (also for strategy "tensor")."""
    if scheme.block_structure is None:
        return w_RC.unflatten(1, (-1, scheme.group_size or w_RC.shape[1]))
    (R, C), (H, W) = w_RC.shape, scheme.block_structure
    if R % H or C % W:
        w_RC = pad(w_RC, (0, -C % W, 0, -R % H))
    return w_RC.unflatten(1, (-1, W)).unflatten(0, (-1, H))


def untiled(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view as [R, C], without what `tiled` filled up."""
    if x.ndim == 3:
        return x.flatten(1)
    return x.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def over_tiles(scale: Tensor, x: Tensor) -> Tensor:
    """One number a tile ([R, G], [M, N], or [1] for all), shaped to be broadcast over `x`."""
    if x.ndim == 4:
        return scale[:, None, :, None]
    return scale.expand(x.shape[0], -1)[..., None]


def magnitude(x: Tensor, scratch: Scratch) -> Tensor:
    """The largest absolute value of each tile, in the weight's dtype. `NonFinite` on NaN or Inf.

    Found among bit patterns: without their sign these order as the numbers do, Inf and NaN on
    top, and torch is several times faster at small integers than at bf16.
    """
    bits = x.view(BITS[x.itemsize])
    unsigned = torch.iinfo(bits.dtype).max
    found = []
    for part in blocks(bits, scratch.block_elements):
        held = scratch.tensor("bits", part.shape, bits.dtype)
        found.append(_largest(torch.bitwise_and(part, unsigned, out=held)))
    return _finite(torch.cat(found), x.dtype)


def extremes(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """min(amin, 0) and max(amax, 0) of each tile, in its dtype. `NonFinite` on NaN or Inf."""
    bits = x.view(BITS[x.itemsize])
    sign = torch.iinfo(bits.dtype).min
    below, above = [], []
    for part in blocks(bits, scratch.block_elements):
        held = scratch.tensor("bits", part.shape, bits.dtype)
        # with the sign bit flipped, what was negative is on top, and orders by magnitude
        below.append(_largest(torch.bitwise_xor(part, sign, out=held)))
        above.append(_largest(part))
    low = _finite(torch.cat(below).clamp_(min=0), x.dtype)
    return low.neg_(), _finite(torch.cat(above).clamp_(min=0), x.dtype)


def _largest(bits: Tensor) -> Tensor:
    return bits.amax(3).amax(1) if bits.ndim == 4 else bits.amax(-1)


def _finite(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """As numbers. Bits of Inf are above all finite numbers', those of NaN above Inf's."""
    if bits.numel() and bits.amax() >= torch.tensor(torch.inf, dtype=dtype).view(bits.dtype):
        raise NonFinite("NaN or Inf")
    return bits.view(dtype)
