"""Codes of a paged cache, loaded as threads hold the first operand of a product.

A product on tensor cores takes its first operand from registers: of sixteen rows a thread has two,
eight apart, and four threads share a row. What a product sums over may be in any order, and so may
its rows. So keys are loaded such that the neighbouring bytes which a thread gets are those that it
multiplies, and values such that they are rows of its results: codes are decoded where they were
loaded, and pass neither to other threads nor through shared memory.

`where` is a tuple: what points to a head's first token, the sequence's block table, the oldest
position that is seen, keys of the sequence, elements from a block and from a token to the next.

Shape letters: W bytes of a head (WIDTH, of which HELD are there), N keys of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def key_bytes(w_W, WIDTH: tl.constexpr):
    """Which byte of a head the column w of `keys_of` is."""
    LANE: tl.constexpr = min(16, WIDTH // 4)
    pair = w_W // 16 * 2 + w_W % 4 // 2  # of those of a thread
    run, pair = pair // (LANE // 2), pair % (LANE // 2)
    return (run * 4 + w_W // 4 % 4) * LANE + pair // 4 * 8 + w_W % 2 * 4 + pair % 4


@triton.jit
def value_bytes(w_W, WIDTH: tl.constexpr):
    """Which byte of a head the row w of `values_of` is."""
    LANE: tl.constexpr = min(16, WIDTH // 8)
    byte = w_W // 8
    return (byte // LANE * 8 + w_W % 8) * LANE + byte % LANE


@triton.jit
def _axis(size: tl.constexpr, axis: tl.constexpr):
    """0 to size along one of seven axes."""
    x = tl.arange(0, size)  # not reshaped: Triton would forget that these are neighbours
    for i in tl.static_range(6):
        x = tl.expand_dims(x, 0 if i < axis else i + 1)
    return x


@triton.jit
def _divisible(o, ALIGN: tl.constexpr):
    return tl.multiple_of(o, (ALIGN, ALIGN, ALIGN, ALIGN, ALIGN, ALIGN, ALIGN))


@triton.jit
def _load(
    where,
    first,
    within,
    word,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Words of the keys `within` sixteen from `first` on; zeros after HELD bytes."""
    code_ptr, table_ptr, oldest, length, stride_block, stride_token = where
    SAME: tl.constexpr = 16 if BLOCK % 16 == 0 else 1  # keys that surely lie in one block
    key, token = (first, within) if SAME == 16 else (first + within, within * 0)
    seen = (key < length) & (key + SAME > oldest)
    block = tl.load(table_ptr + key // BLOCK, mask=seen, other=0).to(tl.int64)
    ptrs = code_ptr + _divisible(block * stride_block + key % BLOCK * stride_token, ALIGN)
    o_token = _divisible(token.to(tl.int64) * stride_token, ALIGN)
    if code_ptr.dtype.element_ty == tl.uint8:
        found = tl.zeros(word.shape, tl.int32)
        for i in tl.static_range(4):
            code = tl.load(ptrs + (o_token + 4 * word + i), mask=4 * word + i < HELD, other=0)
            found |= code.to(tl.int32) << 8 * i
        return found
    elif HELD == WIDTH:
        return tl.load(ptrs + (o_token + word))
    else:
        return tl.load(ptrs + (o_token + word), mask=4 * word < HELD, other=0)


@triton.jit
def load_keys(
    where,
    k_first,
    magic,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Words of a tile, those of even and of odd places: what `keys_of` wants decoded."""
    LANE: tl.constexpr = min(16, WIDTH // 4)
    RUNS: tl.constexpr = WIDTH // 4 // LANE
    TILES: tl.constexpr = N // 16 // WARPS
    first = k_first + 16 * (_axis(TILES, 3) * WARPS + _axis(WARPS, 2))
    within = _axis(8, 1) + 8 * _axis(2, 4)
    word = (_axis(RUNS, 5) * 4 + _axis(4, 0)) * (LANE // 4) + _axis(LANE // 4, 6)
    word = tl.broadcast_to(word, (4, 8, WARPS, TILES, 2, RUNS, LANE // 4))
    code = _load(where, first, within, word, WIDTH, HELD, BLOCK, ALIGN)
    one, other = tl.split(tl.reshape(code, (4, 8, WARPS, TILES, 2, RUNS * LANE // 8, 2)))
    return one, other, magic[0], magic[1]


@triton.jit
def keys_of(pairs):
    """[4, 8, WARPS, TILES, 2, PAIRS, 2] -> [N, W]"""
    S: tl.constexpr = pairs.shape
    pairs = tl.reshape(pairs, (4, 8, S[2], S[3], 2, S[5] // 2, 4))
    return tl.reshape(tl.trans(pairs, (3, 2, 4, 1, 5, 0, 6)), (16 * S[2] * S[3], 8 * S[5]))


@triton.jit
def load_values(
    where,
    k_first,
    magic,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Words of a tile, of even and of odd keys: what `values_of` wants decoded."""
    LANE: tl.constexpr = min(16, WIDTH // 8)
    RUNS: tl.constexpr = WIDTH // 8 // LANE
    within = 4 * _axis(4, 0) + 2 * _axis(2, 3) + _axis(2, 4)
    # a row plus nothing: were it plain, Triton would order threads by these words of single rows
    row = _axis(8, 1) ^ (where[3] >> 31)
    word = (_axis(RUNS, 5) * 8 + row) * (LANE // 4) + _axis(LANE // 4, 6)
    word = tl.broadcast_to(word, (4, 8, N // 16, 2, 2, RUNS, LANE // 4))
    code = _load(where, k_first + 16 * _axis(N // 16, 2), within, word, WIDTH, HELD, BLOCK, ALIGN)
    code = tl.trans(code, (0, 1, 2, 3, 5, 6, 4))
    one, other = tl.split(tl.reshape(code, (4, 8, N // 16, 2, 1, RUNS * LANE // 4, 2)))
    return one, other, magic[0], magic[1]


@triton.jit
def values_of(pairs):
    """[4, 8, TILES, 2, 1, BYTES, 2] -> [W, N]"""
    S: tl.constexpr = pairs.shape
    return tl.reshape(tl.trans(pairs, (5, 4, 1, 2, 0, 3, 6)), (8 * S[5], 16 * S[2]))
