"""Codes of a paged cache, loaded as threads hold the first operand of a product.

A product on tensor cores takes its first operand from registers: of sixteen rows a thread has two,
eight apart, and four threads share a row. What a product sums over may be in any order, and so may
its rows. So keys are loaded such that the neighbouring bytes which a thread gets are those that it
multiplies, and values such that they are rows of its results: codes are decoded where they were
loaded, and pass neither to other threads nor through shared memory.

Shape letters: W bytes of a head, N keys of a tile.
"""

import triton
import triton.language as tl

NEXT = tl.constexpr(4)
"""Neighbours along the sum that a thread holds: Triton's kWidth."""


@triton.jit
def key_bytes(w_W, WIDTH: tl.constexpr):
    """Which byte of a head the column w of `keys_of` is."""
    LANE: tl.constexpr = min(16, WIDTH // 4)
    group, lane, pair = w_W // (4 * NEXT), w_W // NEXT % 4, w_W % NEXT // 2
    pair += group * (NEXT // 2)  # of a lane
    run, pair = pair // (LANE // 2), pair % (LANE // 2)
    return (run * 4 + lane) * LANE + pair // 4 * 8 + w_W % 2 * 4 + pair % 4


@triton.jit
def value_bytes(w_W, WIDTH: tl.constexpr):
    """Which byte of a head the row w of `values_of` is."""
    LANE: tl.constexpr = min(16, WIDTH // 8)
    byte = w_W // 8
    return (byte // LANE * 8 + w_W % 8) * LANE + byte % LANE


@triton.jit
def _load(
    code_ptr, table_ptr, first, within, word, oldest, length, stride_block, stride_token,
    HELD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    """int32, four bytes each, of the keys `within` sixteen from `first` on; zeros after HELD bytes.
    """
    SAME: tl.constexpr = BLOCK % 16 == 0  # sixteen keys lie in one block
    key = first if SAME else first + within
    seen = (key < length) & (key + (16 if SAME else 1) > oldest)
    block = tl.load(table_ptr + key // BLOCK, mask=seen, other=0).to(tl.int64)
    o_block = block * stride_block + key % BLOCK * stride_token
    o_block = tl.multiple_of(o_block, (ALIGN, ALIGN, ALIGN, ALIGN, ALIGN, ALIGN, ALIGN))
    o_token = (within if SAME else within * 0).to(tl.int64) * stride_token
    o_token = tl.multiple_of(o_token, (ALIGN, ALIGN, ALIGN, ALIGN, ALIGN, ALIGN, ALIGN))
    if code_ptr.dtype.element_ty == tl.uint8:
        found = tl.zeros(word.shape, tl.int32)
        for i in tl.static_range(4):
            byte = 4 * word + i
            ptrs = (code_ptr + o_block) + (o_token + byte)
            found |= tl.load(ptrs, mask=byte < HELD, other=0).to(tl.int32) << 8 * i
        return found
    else:
        ptrs = (code_ptr + o_block) + (o_token + word)
        if HELD == WIDTH:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=4 * word < HELD, other=0)


@triton.jit
def load_keys(
    code_ptr, table_ptr, k_first, oldest, length, stride_block, stride_token,
    N: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
    WARPS: tl.constexpr, ALIGN: tl.constexpr
):
    """Words of a tile, those of even and of odd places: what `keys_of` wants decoded."""
    LANE: tl.constexpr = min(16, WIDTH // 4)
    RUNS: tl.constexpr = WIDTH // 4 // LANE
    TILES: tl.constexpr = N // 16 // WARPS
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None, None]
    tile = tl.arange(0, TILES)[None, None, None, :, None, None, None]
    half = tl.arange(0, 2)[None, None, None, None, :, None, None]
    within = tl.arange(0, 8)[None, :, None, None, None, None, None] + 8 * half
    first = k_first + 16 * (tile * WARPS + warp)
    lane = tl.arange(0, 4)[:, None, None, None, None, None, None]
    run = tl.arange(0, RUNS)[None, None, None, None, None, :, None]
    word = tl.arange(0, LANE // 4)[None, None, None, None, None, None, :]
    word = (run * 4 + lane) * (LANE // 4) + word
    word = tl.broadcast_to(word, [4, 8, WARPS, TILES, 2, RUNS, LANE // 4])
    code = _load(
        code_ptr, table_ptr, first, within, word, oldest, length, stride_block, stride_token,
        HELD, WIDTH, BLOCK, ALIGN,
    )
    return tl.split(tl.reshape(code, (4, 8, WARPS, TILES, 2, RUNS * LANE // 8, 2)))


@triton.jit
def keys_of(pairs):
    """[4, 8, WARPS, TILES, 2, PAIRS, 2] -> [N, W]"""
    WARPS: tl.constexpr = pairs.shape[2]
    TILES: tl.constexpr = pairs.shape[3]
    PAIRS: tl.constexpr = pairs.shape[5]
    pairs = tl.reshape(pairs, (4, 8, WARPS, TILES, 2, PAIRS * 2 // NEXT, NEXT))
    return tl.reshape(tl.trans(pairs, (3, 2, 4, 1, 5, 0, 6)), (16 * WARPS * TILES, 8 * PAIRS))


@triton.jit
def load_values(
    code_ptr, table_ptr, k_first, oldest, length, stride_block, stride_token,
    N: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr
):
    """Words of a tile, of even and of odd keys: what `values_of` wants decoded."""
    LANE: tl.constexpr = min(16, WIDTH // 8)
    RUNS: tl.constexpr = WIDTH // 8 // LANE
    lane = tl.arange(0, 4)[:, None, None, None, None, None, None]
    group = tl.arange(0, N // (4 * NEXT))[None, None, :, None, None, None, None]
    pair = tl.arange(0, NEXT // 2)[None, None, None, :, None, None, None]
    odd = tl.arange(0, 2)[None, None, None, None, :, None, None]
    within = 4 * lane + 2 * pair + odd
    first = k_first + 16 * group
    # not row ^ 0: Triton would let neighbouring threads take neighbouring words
    row = tl.arange(0, 8)[None, :, None, None, None, None, None] ^ (length >> 31)
    run = tl.arange(0, RUNS)[None, None, None, None, None, :, None]
    word = tl.arange(0, LANE // 4)[None, None, None, None, None, None, :]
    word = (run * 8 + row) * (LANE // 4) + word
    word = tl.broadcast_to(word, [4, 8, N // (4 * NEXT), NEXT // 2, 2, RUNS, LANE // 4])
    code = _load(
        code_ptr, table_ptr, first, within, word, oldest, length, stride_block, stride_token,
        HELD, WIDTH, BLOCK, ALIGN,
    )
    code = tl.trans(code, (0, 1, 2, 3, 5, 6, 4))
    return tl.split(tl.reshape(code, (4, 8, N // (4 * NEXT), NEXT // 2, 1, RUNS * LANE // 4, 2)))


@triton.jit
def values_of(pairs):
    """[4, 8, GROUPS, NEXT / 2, 1, BYTES, 2] -> [W, N]"""
    GROUPS: tl.constexpr = pairs.shape[2]
    BYTES: tl.constexpr = pairs.shape[5]
    return tl.reshape(tl.trans(pairs, (5, 4, 1, 2, 0, 3, 6)), (8 * BYTES, 4 * NEXT * GROUPS))
