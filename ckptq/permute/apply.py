"""Move the rows of tensors, bit for bit.

Works on any dtype and device: rows are moved as integers of the same width, because torch does not
index every 8-bit float and because NaN payloads must survive.

Shape letters: R rows, W words of 32 bits, G columns of a packed tensor, N anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptq.permute.effect import Effect, Move
from ckptq.rope_order import Heads, RopeOrder, gather_indices

_WORD_BITS = 32
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_permutation(heads: Heads, to: RopeOrder) -> Tensor:
    """Gather indices [R], int64: `w[row_permutation(heads, to)]` is `w` in the order `to`."""
    return torch.tensor(gather_indices(heads, to))


def permute_rows(x_RN: Tensor, heads: Heads, to: RopeOrder) -> Tensor:
    """A copy of `x_RN` with its rows in the order `to`; the input is in the other order.

    The leading dimensions may be any split of R, as [H, D] or [H, 1, D].
    """
    bits_RN = x_RN.contiguous().view(_INTEGERS[x_RN.element_size()]).reshape(heads.rows, -1)
    moved_RN = bits_RN.index_select(0, row_permutation(heads, to).to(x_RN.device))
    return moved_RN.reshape(x_RN.shape).view(x_RN.dtype)


def permute_packed_rows(x_WG: Tensor, heads: Heads, bits: int, to: RopeOrder) -> Tensor:
    """As `permute_rows` for int32 words that hold `bits`-bit codes packed along the rows.

    Row r takes bits r * bits and up of its column, seen as one string of bits from the first
    word's lowest (compressed-tensors' `pack_to_int32` with packed_dim=0, dense for any width).
    Bits beyond the last row stay as they are.
    """
    shift_1b1 = torch.arange(_WORD_BITS, dtype=torch.int32, device=x_WG.device)[None, :, None]
    string_bG = (x_WG[:, None, :] >> shift_1b1 & 1).flatten(0, 1)
    used = heads.rows * bits
    codes_RbG = string_bG[:used].unflatten(0, (heads.rows, bits))
    string_bG[:used] = permute_rows(codes_RbG, heads, to).flatten(0, 1)
    return (string_bG.unflatten(0, (-1, _WORD_BITS)) << shift_1b1).sum(1, dtype=torch.int32)


def permute_tensor(tensor: Tensor, effect: Effect, to: RopeOrder) -> Tensor:
    """Do to one tensor what `effect` says. A kept tensor is returned itself."""
    if effect.move is Move.KEPT:
        return tensor
    if effect.move is Move.PACKED_ROWS:
        return permute_packed_rows(tensor, effect.heads, effect.bits, to)
    return permute_rows(tensor, effect.heads, to)
