"""From a weight and its scales to the codes that are stored.

Shape letters: R rows, C columns, P packed columns; `x` is a weight as `tiles.tiled` shows it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ckptq.quantize.codes import rounded
from ckptq.quantize.packing import pack_nibbles, pack_words
from ckptq.quantize.scratch import Scratch, block_length
from ckptq.quantize.tiles import over_tiles, untiled
from ckptq.quantize.weight_scheme import WeightScheme


def encode(
    x: Tensor,
    divisor: Tensor,
    zero_point: Tensor | None,
    scheme: WeightScheme,
    scratch: Scratch,
    out_RP: Tensor,
) -> None:
    """Write the codes nearest to x / divisor + zero_point, with one of each a tile.

    Divided in float32, or float64 for float64 weights.
    """
    quotients = _quotients(x, divisor, zero_point, scratch)
    if scheme.codes == "weight_packed":
        for part, q in zip(
            out_RP.split(block_length(x, scratch.block_elements)), quotients, strict=True
        ):
            part.copy_(_packed(rounded(q, scheme, scratch), scheme, scratch))
        return
    filled_up = x.numel() != out_RP.numel()
    code = scratch.tensor("code", x.shape, out_RP.dtype) if filled_up else out_RP.view(x.shape)
    for part, q in zip(code.split(block_length(x, scratch.block_elements)), quotients, strict=True):
        part.copy_(rounded(q, scheme, scratch))
    if filled_up:
        out_RP.copy_(untiled(code, out_RP.shape))


def _quotients(
    x: Tensor, divisor: Tensor, zero_point: Tensor | None, scratch: Scratch
) -> Iterator[Tensor]:
    """x / divisor + zero_point a block at a time, each in the memory of the one before."""
    wide = torch.promote_types(x.dtype, torch.float32)
    operands = [x, over_tiles(divisor.to(wide), x)]
    if zero_point is not None:
        operands.append(over_tiles(zero_point, x))
    for part, scale, *shift in zip(
        *(each.split(block_length(x, scratch.block_elements)) for each in operands), strict=True
    ):
        # torch widens what it divides in fresh memory
        q = scratch.tensor("quotient", part.shape, wide).copy_(part).div_(scale)
        yield q.add_(shift[0]) if shift else q


def _packed(code: Tensor, scheme: WeightScheme, scratch: Scratch) -> Tensor:
    code_RC = scratch.tensor("code", code.shape, torch.int8).copy_(code).flatten(1)
    return pack_words(code_RC, scheme.num_bits) if scheme.type == "int" else pack_nibbles(code_RC)
