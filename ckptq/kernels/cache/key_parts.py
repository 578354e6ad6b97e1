"""The keys of a decode step divided among programs, and their results merged.

With one query of each sequence, a program for each sequence and key/value head leaves most of a
GPU idle: it waits for the keys of one tile at a time. So several programs take a part of the keys
each, and leave a result, its maximum and its sum, as the online softmax of "Flash-Decoding" (Dao
et al., 2023) does; `merge` adds them under a common maximum.

Shape letters: R rows (query tokens x heads), P parts, D head dimension.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.gpu import multiprocessors
from ckptq.kernels.rounding import narrow

PROGRAMS = 8
"""Programs wanted for each multiprocessor."""
LEAST = 256
"""Keys that are worth a program."""
MOST = 32


@dataclass(frozen=True, slots=True)
class Partial:
    """What the programs leave: fp32 results [P, R, D], maxima [P, R] and sums [P, R]."""

    out: Tensor | None
    max: Tensor | None
    sum: Tensor | None
    parts: int

    @staticmethod
    def of(rows: int, D: int, parts: int, device: torch.device) -> "Partial":
        """Nothing for one part, which needs no merging."""
        if parts == 1:
            return Partial(None, None, None, 1)
        out = torch.empty(parts, rows, D, dtype=torch.float32, device=device)
        highest, total = torch.empty(2, parts, rows, device=device)
        return Partial(out, highest, total, parts)

    def merge(self, out: Tensor) -> None:
        """Write the whole results into `out`, [R, D] in any shape."""
        if self.out is None:
            return
        _, rows, D = self.out.shape
        grid, block = (rows,), triton.next_power_of_2(D)
        arguments = (self.out, self.max, self.sum, out, rows)
        _merge_kernel[grid](*arguments, D=D, PARTS=self.parts, BLOCK_D=block, num_warps=2)


def parts_of(programs: int, keys: int, device: torch.device, each: int = PROGRAMS) -> int:
    """A power of two: among how many programs each of `programs` divides its `keys`, at most.

    `each` is how many are wanted for a multiprocessor.
    """
    wanted = min(each * multiprocessors(device) // programs, keys // LEAST, MOST)
    return 1 << max(wanted, 1).bit_length() - 1


@triton.jit
def keys_of_part(begin, end, part, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """The part's share of the keys from `begin` to `end`, in whole tiles."""
    if PARTS == 1:
        return begin, end
    else:
        share = tl.cdiv(tl.cdiv(end - begin, COLUMNS), PARTS) * COLUMNS
        first = begin + part * share
        return first, tl.minimum(first + share, end)


@triton.jit
def store_part(row_M, max_M, sum_M, max_ptr, sum_ptr, real_M, rows):
    """Leave maxima and sums of this program's part; gives the rows of its results."""
    row_M += tl.program_id(2).to(tl.int64) * rows
    tl.store(max_ptr + row_M, max_M, mask=real_M)
    tl.store(sum_ptr + row_M, sum_M, mask=real_M)
    return row_M


@triton.jit
def _merge_kernel(
    partial_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    rows,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_P = tl.arange(0, PARTS).to(tl.int64) * rows + tl.program_id(0)
    o_D = tl.arange(0, BLOCK_D)
    max_P, sum_P = tl.load(max_ptr + row_P), tl.load(sum_ptr + row_P)
    best = tl.max(max_P, 0)
    anchor = tl.where(best == float("-inf"), 0.0, best)  # a query without keys
    weight_P = sum_P * tl.exp2(max_P - anchor)
    total = tl.sum(weight_P, 0)
    m_D = o_D < D
    part_PD = tl.load(partial_ptr + row_P[:, None] * D + o_D[None, :], mask=m_D[None, :], other=0.0)
    out_D = tl.sum(part_PD * weight_P[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_ptrs = out_ptr + tl.program_id(0).to(tl.int64) * D + o_D
    tl.store(out_ptrs, narrow(out_D, out_ptr.dtype.element_ty), mask=m_D)
