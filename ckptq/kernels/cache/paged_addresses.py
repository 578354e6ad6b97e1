"""Where the tokens of a paged cache lie, and which queries a program takes: `paging` in kernels.

Shape letters: M rows of a tile of queries, N keys of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def slot_offset(slot, stride_block, stride_token, BLOCK: tl.constexpr):
    """Elements from the cache's start to a slot (int64), for head 0."""
    return (slot // BLOCK) * stride_block + (slot % BLOCK) * stride_token


@triton.jit
def key_offset(table_ptr, k_N, seen_N, stride_block, stride_token, BLOCK: tl.constexpr):
    """Elements from the cache's start to the keys at positions k, through a sequence's table."""
    block_N = tl.load(table_ptr + k_N // BLOCK, mask=seen_N, other=0).to(tl.int64)
    return block_N * stride_block + (k_N % BLOCK) * stride_token


@triton.jit
def query_rows(starts_ptr, sequence, first, length, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """A tile of queries: ROWS // GROUP tokens from `first` on, each with the heads of a group.

    Gives, per row: the token among all queries, its head within the group, whether there is one,
    its position (negative where a sequence has more queries than keys: such a query sees nothing);
    then the first and last position of the tile (last < first if none).
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    begin = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - begin
    row_M = tl.arange(0, ROWS)
    token_M = first + row_M // GROUP
    real_M = (row_M < TOKENS * GROUP) & (token_M < queries)
    shift = length - queries
    position_M = tl.where(real_M, token_M + shift, -1)
    last = tl.minimum(first + TOKENS, queries) - 1
    token_M = (begin + token_M).to(tl.int64)
    return token_M, row_M % GROUP, real_M, position_M, first + shift, last + shift
