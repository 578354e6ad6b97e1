"""Errors of bf16 weights by lookup: bf16 has so few scales and numbers that a search meets the
same pair of them thousands of times.

A table has a row for each scale, or for each zero point under a scale, made when the first tile
asks for it, and a column for each number of the window that weights lie in. What is looked up is
what `powered_errors` computes, bit for bit. Threads share it: two that make the same row write the
same bytes.

Shape letters: K candidates, T tiles, L weights of a tile, S scales (with zero points), N numbers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ckptq.quantize.scratch import Scratch
from ckptq.quantize.tile_error import powered_errors
from ckptq.quantize.weight_scheme import WeightScheme

PER_OCTAVE = 128
"""bf16 numbers, and so scales, between two powers of two."""
LEAST, OCTAVES = 127 - 44, 48
"""Weights are zero, or from 2^-44 up to 2^4; others are not looked up."""
LEAST_SCALE, SCALE_OCTAVES = 127 - 56, 64
ROWS_AT_ONCE = 8
LOOKED_UP_AT_ONCE = 1 << 16
"""Weights: more do not fit the cache with their rows, for fewer the calls take longer."""


class ErrorTable:
    """`powered_errors` of one scheme, for bf16 weights on a CPU."""

    def __init__(self, scheme: WeightScheme, norm: float) -> None:
        self.scheme, self.norm = scheme, norm
        self.zero_points = 1 if scheme.symmetric else 1 << scheme.num_bits
        magnitude = torch.arange(OCTAVES * PER_OCTAVE, dtype=torch.int16) + LEAST * PER_OCTAVE
        magnitude[0] = 0
        signs = (0, -(1 << 15)) if scheme.type == "int" else (0,)  # integers: one more below zero
        self.x_N = torch.cat([magnitude | sign for sign in signs]).view(torch.bfloat16)
        self.column_of_bits = torch.full((1 << 16,), -1, dtype=torch.int32)
        for sign in (0, 1 << 15):
            column = torch.arange(len(magnitude), dtype=torch.int32)
            column += len(magnitude) if sign and len(signs) == 2 else 0
            self.column_of_bits[magnitude.long() + sign] = column
        scales = SCALE_OCTAVES * PER_OCTAVE * self.zero_points
        # memory that no row is written to is never taken from the system
        self.error_SN = torch.empty(scales, len(self.x_N), dtype=torch.bfloat16)
        self.is_made_S = torch.zeros(scales, dtype=torch.bool)

    def columns(self, x_TL: Tensor) -> Tensor | None:
        """int32 [T, L]: where each weight's errors are; None if one lies outside of the window."""
        bits = x_TL.contiguous().view(torch.int16).int().bitwise_and_(0xFFFF)
        column = self.column_of_bits.index_select(0, bits.view(-1))
        return None if column.amin() < 0 else column.view(x_TL.shape)

    def rows(self, scale: Tensor, zero_point: Tensor | None, scratch: Scratch) -> Tensor | None:
        """int32: where the errors under each scale and zero point begin; None if a scale lies
        outside of the window."""
        row = scale.view(torch.int16).int() - LEAST_SCALE * PER_OCTAVE
        low, high = row.aminmax()
        if low < 0 or high >= SCALE_OCTAVES * PER_OCTAVE:
            return None
        if zero_point is not None:
            row.mul_(self.zero_points).add_(zero_point.int() + self.zero_points // 2)
        if not self.is_made_S.index_select(0, row.flatten()).all():
            asked_S = torch.zeros_like(self.is_made_S)
            asked_S[row.flatten()] = True
            self._make((asked_S & ~self.is_made_S).nonzero().flatten(), scratch)
        return row.mul_(len(self.x_N))

    def _make(self, row_S: Tensor, scratch: Scratch) -> None:
        for some in row_S.split(ROWS_AT_ONCE):
            bits = (some // self.zero_points + LEAST_SCALE * PER_OCTAVE).short()
            scale_S1 = bits.view(torch.bfloat16)[:, None]
            zero_S1 = None
            if not self.scheme.symmetric:
                zero_S1 = (some % self.zero_points - self.zero_points // 2)[:, None].to(torch.int8)
            x_SN = self.x_N.expand(len(some), -1)
            self.error_SN[some] = powered_errors(
                x_SN, scale_S1, zero_S1, self.scheme, self.norm, scratch
            )
            self.is_made_S[some] = True

    def sums(self, column_TL: Tensor, row_KT: Tensor, scratch: Scratch) -> Tensor:
        """[K, T]: the sum of each tile's errors under each of its scales.

        Tiles of like scales follow each other, a few at a time through all candidates: the rows
        that these share stay in the cache.
        """
        order_T = row_KT[0].argsort()
        column_TL, row_KT = column_TL.index_select(0, order_T), row_KT.index_select(1, order_T)
        sum_KT = torch.empty(row_KT.shape, dtype=torch.bfloat16)
        at_once = max(LOOKED_UP_AT_ONCE // column_TL.shape[1], 1)
        parts = (column_TL.split(at_once), row_KT.split(at_once, 1), sum_KT.split(at_once, 1))
        for column_SL, row_KS, sum_KS in zip(*parts, strict=True):
            self._sums(column_SL, row_KS, sum_KS, scratch)
        place_T = torch.empty_like(order_T)
        place_T[order_T] = torch.arange(len(order_T))
        return sum_KT.index_select(1, place_T)

    def _sums(self, at_TL: Tensor, row_KT: Tensor, out_KT: Tensor, scratch: Scratch) -> None:
        """Uses `at_TL` up: from the columns it moves on from row to row."""
        error_1, at = self.error_SN.view(-1), at_TL.view(-1)
        error_TL = scratch.tensor("errors", at_TL.shape, torch.bfloat16)
        error = error_TL.view(-1)
        step_KT = row_KT.diff(dim=0, prepend=torch.zeros_like(row_KT[:1]))
        for step_T1, sum_T in zip(step_KT[..., None], out_KT, strict=True):
            at_TL.add_(step_T1)
            torch.index_select(error_1, 0, at, out=error)
            torch.sum(error_TL, -1, out=sum_T)


@cache
def error_table(scheme: WeightScheme, norm: float) -> ErrorTable:
    """The one table of a scheme."""
    return ErrorTable(scheme, norm)


def has_table(x: Tensor, scheme: WeightScheme) -> bool:
    """Whether errors of these weights are in a table, but for those outside of its window."""
    few = scheme.symmetric or scheme.num_bits <= 4  # 256 zero points would be too many rows
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and few
