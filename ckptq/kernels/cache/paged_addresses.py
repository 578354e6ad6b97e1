"""Where the tokens of a paged cache lie, and which queries a program takes: `paging` in kernels.

Shape letters: M rows of a tile of queries, N keys of a tile.
"""

import triton
import triton.language as tl

from ckptq.kernels.attention.online_softmax import key_bounds, oldest_key
from ckptq.kernels.cache.key_parts import keys_of_part


@triton.jit
def slot_offset(slot, strides, BLOCK: tl.constexpr):
    """Elements from the cache's start to a slot (int64), for head 0."""
    return (slot // BLOCK) * strides[0] + (slot % BLOCK) * strides[1]


@triton.jit
def key_offset(table_ptr, k_N, seen_N, strides, BLOCK: tl.constexpr):
    """Elements from the cache's start to the keys at positions k, through a sequence's table."""
    block_N = tl.load(table_ptr + k_N // BLOCK, mask=seen_N, other=0).to(tl.int64)
    return block_N * strides[0] + (k_N % BLOCK) * strides[1]


@triton.jit
def program_of(
    sequences,
    H,
    MASK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile of queries, ROWS // GROUP tokens with the heads of a group, and the keys it sees.

    Gives, per row: the token among all queries, its head, whether there is one, its position
    (negative where a sequence has more queries than keys: such a query sees nothing). Then the
    key/value head, the sequence's row of the block table, its keys, the first and the last of those
    that this program takes, and the oldest that is needed.
    """
    starts_ptr, length_ptr, table_ptr, table_stride = sequences
    TOKENS: tl.constexpr = ROWS // GROUP
    K = H // GROUP
    sequence, kv = tl.program_id(1) // K, tl.program_id(1) % K
    length = tl.load(length_ptr + sequence)
    start = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - start
    # under a causal mask the last queries see most keys: their programs start first
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    row_M = tl.arange(0, ROWS)
    token_M = first + row_M // GROUP
    real_M = (row_M < TOKENS * GROUP) & (token_M < queries)
    shift = length - queries
    position_M = tl.where(real_M, token_M + shift, -1)
    last = tl.minimum(first + TOKENS, queries) - 1
    begin, _, _, end = key_bounds(first + shift, last + shift, length, MASK, COLUMNS)
    begin, end = keys_of_part(begin, end, tl.program_id(2), PARTS, COLUMNS)
    token_M, head_M = (start + token_M).to(tl.int64), kv * GROUP + row_M % GROUP
    table_ptr += sequence * table_stride
    oldest = oldest_key(first + shift, MASK)
    return token_M, head_M, real_M, position_M, kv, table_ptr, length, begin, end, oldest
