"""Rows of a tile as threads hold them in a product of tensor cores whose operand is in registers.

A warp has sixteen rows: a thread two of them, eight apart, and four neighbouring threads the same
two. What is loaded as [8, WARPS, 2, ...] is held so from the beginning, and need not be moved.

Shape letters: R rows of a tile, 16 a warp; S columns; U units of a row.
"""

import triton
import triton.language as tl


@triton.jit
def product_rows(WARPS: tl.constexpr):
    """The rows of a tile, [8, WARPS, 2]."""
    row = tl.arange(0, 8)[:, None, None] + 16 * tl.arange(0, WARPS)[None, :, None]
    return row + 8 * tl.arange(0, 2)[None, None, :]


@triton.jit
def in_order(x_8W2, WARPS: tl.constexpr):
    """[8, WARPS, 2, S] -> [R, S]."""
    return tl.reshape(tl.trans(x_8W2, (1, 2, 0, 3)), (16 * WARPS, x_8W2.shape[3]))


@triton.jit
def lanes_in_order(x_L8W2, WARPS: tl.constexpr):
    """[LANES, 8, WARPS, 2] -> [R, LANES]."""
    return tl.reshape(tl.trans(x_L8W2, (2, 3, 1, 0)), (16 * WARPS, x_L8W2.shape[0]))


@triton.jit
def among_lanes(x_R, LANES: tl.constexpr, WARPS: tl.constexpr):
    """[R] -> [LANES, 8, WARPS, 2], the same for every lane that shares a row."""
    x_8W2 = tl.trans(tl.reshape(x_R, (WARPS, 2, 8)), (2, 0, 1))
    return tl.broadcast_to(x_8W2[None], (LANES, 8, WARPS, 2))


@triton.jit
def runs_of_lanes(x_RU, LANES: tl.constexpr, WARPS: tl.constexpr):
    """[R, U] -> [LANES, 8, WARPS, 2, U / LANES]: the neighbours that a lane holds come last."""
    x = tl.reshape(x_RU, (WARPS, 2, 8, LANES, x_RU.shape[1] // LANES))
    return tl.trans(x, (3, 2, 0, 1, 4))
