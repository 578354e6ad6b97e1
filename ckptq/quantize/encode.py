"""From a weight and its scales to the codes that are stored.

Shape letters: R rows, C columns, P packed columns; `x` is a weight as `tiles.tiled` shows it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ckptq.quantize.codes import rounded
from ckptq.quantize.packing import pack_nibbles, pack_words
from ckptq.quantize.scheme import WeightScheme
from ckptq.quantize.scratch import Scratch, blocks
from ckptq.quantize.tiles import over_tiles


def encode(x: Tensor, divisor: Tensor, zero_point: Tensor | None, scheme: WeightScheme) -> Tensor:
    """The codes nearest to x / divisor + zero_point, with one divisor and zero point a tile.

    Packed they are [R, P], else in the shape of `x`. Divided in float32, or float64 for float64
    weights.
    """
    scratch = Scratch()
    quotients = _quotients(x, divisor, zero_point, scratch)
    if scheme.codes == "weight_packed":
        return torch.cat([_packed(q, scheme, scratch) for q in quotients])
    dtype = torch.int8 if scheme.type == "int" else torch.float8_e4m3fn
    code = torch.empty(x.shape, dtype=dtype, device=x.device)
    for out, q in zip(blocks(code), quotients, strict=True):
        out.copy_(rounded(q, scheme, scratch))
    return code


def _quotients(
    x: Tensor, divisor: Tensor, zero_point: Tensor | None, scratch: Scratch
) -> Iterator[Tensor]:
    """x / divisor + zero_point a block at a time, each in the memory of the one before."""
    wide = torch.promote_types(x.dtype, torch.float32)
    divisors = over_tiles(divisor.to(wide), x)
    zero_points = None if zero_point is None else over_tiles(zero_point, x)
    start = 0
    for part in blocks(x):
        rows = slice(start, start := start + len(part))
        q = torch.div(part, divisors[rows], out=scratch.line(0, part, wide))
        yield q if zero_points is None else q.add_(zero_points[rows])


def _packed(q: Tensor, scheme: WeightScheme, scratch: Scratch) -> Tensor:
    code = scratch.line(3, q, torch.int8).copy_(rounded(q, scheme, scratch)).flatten(1)
    return pack_words(code, scheme.num_bits) if scheme.type == "int" else pack_nibbles(code)
