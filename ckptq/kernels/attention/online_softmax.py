"""What the attention kernels share: which keys a tile of queries sees, and the online softmax.

Scores stay as the dot products gave them; `factor` (scale, descales and log2 e in one) is applied
inside the exponential, where it fuses with the subtraction of the maximum.

Shape letters: M queries of a tile, N keys of a tile.
"""

import triton
import triton.language as tl

from ckptq.kernels.rounding import INTERPRETED, widen


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32. The interpreter multiplies the bit patterns of bf16, so it gets fp32."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def oldest_key(first, MASK: tl.constexpr):
    """The first position that a window or a chunk leaves to queries from position `first` on.

    What lies before may be gone: engines give the blocks of a paged cache back that no window
    reaches any more, and whatever they hold then, no weight of zero would make a zero of a NaN.
    """
    oldest = 0
    if MASK[1]:
        oldest = tl.maximum(first - MASK[1] + 1, 0)
    if MASK[2]:
        oldest = tl.maximum(oldest, first // MASK[2] * MASK[2])
    return oldest


@triton.jit
def key_bounds(first, last, length, MASK: tl.constexpr, COLUMNS: tl.constexpr):
    """Positions (begin, full, partial, end) of keys for the queries at positions first to last.

    Tiles of keys from `full` to `partial` are seen whole by every one of these queries; those from
    `begin` to `full` and from `partial` to `end` need the mask; the others are seen by none. All
    but `end`, or what equals it, are multiples of COLUMNS. Without queries (last < first) there are
    no keys.
    """
    CAUSAL: tl.constexpr = MASK[0]
    WINDOW: tl.constexpr = MASK[1]
    CHUNK: tl.constexpr = MASK[2]
    begin = oldest_key(first, MASK)
    end = length
    begin_all = 0
    end_all = length
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        end_all = tl.minimum(end_all, first + 1)
    if WINDOW:
        begin_all = tl.maximum(last - WINDOW + 1, 0)
    if CHUNK:
        begin_all = tl.maximum(begin_all, last // CHUNK * CHUNK)
        end = tl.minimum(end, (last // CHUNK + 1) * CHUNK)
        end_all = tl.minimum(end_all, (first // CHUNK + 1) * CHUNK)
    end = tl.where(last < first, 0, end)
    begin = begin // COLUMNS * COLUMNS
    full = tl.minimum(tl.cdiv(begin_all, COLUMNS), tl.cdiv(end, COLUMNS)) * COLUMNS
    full = tl.maximum(full, begin)
    partial = tl.maximum(end_all // COLUMNS * COLUMNS, full)
    partial = tl.where(last < first, full, partial)
    return begin, tl.minimum(full, end), tl.minimum(partial, end), end


@triton.jit
def visible(q_M, k_N, length, MASK: tl.constexpr):
    """[M, N]: whether the query at position q attends to the key at position k."""
    last_M = tl.where(q_M < 0, -1, tl.minimum(q_M, length - 1) if MASK[0] else length - 1)
    seen_MN = k_N[None, :] <= last_M[:, None]
    if MASK[1]:
        seen_MN = seen_MN & (k_N[None, :] > q_M[:, None] - MASK[1])
    if MASK[2]:
        seen_MN = seen_MN & (k_N[None, :] // MASK[2] == q_M[:, None] // MASK[2])
    return seen_MN


@triton.jit
def cap(score_MN, slope):
    """tanh(score * slope): a soft cap without its height, which is left to `factor`."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(score_MN * (slope * 2.8853900817779268)))


@triton.jit
def fold(score_MN, max_M, sum_M, factor, LIFT: tl.constexpr, MASKED: tl.constexpr):
    """One step of the online softmax, in base 2: weights, decay of what is summed, maximum, sum.

    Weights are 2^LIFT at most, and so is their sum too large: both cancel in the quotient.
    """
    new_M = tl.maximum(max_M, tl.max(score_MN, 1) * factor)
    anchor_M = new_M
    if MASKED:  # a row that has seen no key yet would subtract -inf from -inf
        anchor_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    weight_MN = tl.exp2(score_MN * factor - (anchor_M - LIFT)[:, None])
    decay_M = tl.exp2(max_M - anchor_M)
    return weight_MN, decay_M, new_M, sum_M * decay_M + tl.sum(weight_MN, 1)


@triton.jit
def finish(acc_MD, sum_M):
    """Divide by the sum of the weights; rows without keys become zero."""
    empty_M = sum_M == 0.0
    return tl.where(empty_M[:, None], 0.0, acc_MD / tl.where(empty_M, 1.0, sum_M)[:, None])
