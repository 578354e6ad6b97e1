"""Codes of a paged cache, loaded as threads hold the first operand of a product.

A product on tensor cores takes its first operand from registers: of sixteen rows a thread has two,
eight apart, and four threads share a row. What a product sums over may be in any order, and so may
its rows. So keys are loaded such that the neighbouring bytes which a thread gets are those that it
multiplies, and values such that they are rows of its results: codes are decoded where they were
loaded, and pass neither to other threads nor through shared memory.

`where` is a tuple: the sequence's block table, the oldest position that is seen, keys of the
sequence, elements from a block and a token to the next.

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
def load_codes(
    code_ptr,
    where,
    k_first,
    KEYS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Words of a tile, zeros after HELD bytes, in two tensors: of keys those of even and of odd
    places, what `keys_of` wants decoded, of values those of even and of odd keys, for `values_of`.
    """
    table_ptr, oldest, length, strides = where
    SHARE: tl.constexpr = 4 if KEYS else 8  # a head among so many threads
    LANE: tl.constexpr = min(16, WIDTH // SHARE)
    RUNS: tl.constexpr = WIDTH // SHARE // LANE
    A: tl.constexpr = WARPS if KEYS else N // 16
    B: tl.constexpr = N // 16 // WARPS if KEYS else 2
    if KEYS:
        first = k_first + 16 * (_axis(B, 3) * A + _axis(A, 2))
        within = _axis(8, 1) + 8 * _axis(2, 4)
        thread = _axis(4, 0)
    else:
        first = k_first + 16 * _axis(A, 2)
        within = 4 * _axis(4, 0) + 2 * _axis(2, 3) + _axis(2, 4)
        # plus nothing: were it plain, Triton would order threads by these words of single rows
        thread = _axis(8, 1) ^ (length >> 31)
    word = (_axis(RUNS, 5) * SHARE + thread) * (LANE // 4) + _axis(LANE // 4, 6)
    word = tl.broadcast_to(word, (4, 8, A, B, 2, RUNS, LANE // 4))

    SAME: tl.constexpr = 16 if BLOCK % 16 == 0 else 1  # keys that surely lie in one block
    key, token = (first, within) if SAME == 16 else (first + within, within * 0)
    seen = (key < length) & (key + SAME > oldest)
    block = tl.load(table_ptr + key // BLOCK, mask=seen, other=0).to(tl.int64)
    ptrs = code_ptr + _divisible(block * strides[0] + key % BLOCK * strides[1], ALIGN)
    o_token = _divisible(token.to(tl.int64) * strides[1], ALIGN)
    if code_ptr.dtype.element_ty == tl.uint8:
        code = tl.zeros(word.shape, tl.int32)
        for i in tl.static_range(4):
            byte = tl.load(ptrs + (o_token + 4 * word + i), mask=4 * word + i < HELD, other=0)
            code |= byte.to(tl.int32) << 8 * i
    elif HELD == WIDTH:
        code = tl.load(ptrs + (o_token + word))
    else:
        code = tl.load(ptrs + (o_token + word), mask=4 * word < HELD, other=0)

    if KEYS:
        pairs = tl.reshape(code, (4, 8, A, B, 2, RUNS * LANE // 8, 2))
    else:
        code = tl.trans(code, (0, 1, 2, 3, 5, 6, 4))
        pairs = tl.reshape(code, (4, 8, A, B, 1, RUNS * LANE // 4, 2))
    return tl.split(pairs)


@triton.jit
def keys_of(pairs):
    """[4, 8, WARPS, TILES, 2, PAIRS, 2] -> [N, W]"""
    S: tl.constexpr = pairs.shape
    pairs = tl.reshape(pairs, (4, 8, S[2], S[3], 2, S[5] // 2, 4))
    return tl.reshape(tl.trans(pairs, (3, 2, 4, 1, 5, 0, 6)), (16 * S[2] * S[3], 8 * S[5]))


@triton.jit
def values_of(pairs):
    """[4, 8, TILES, 2, 1, BYTES, 2] -> [W, N]"""
    S: tl.constexpr = pairs.shape
    return tl.reshape(tl.trans(pairs, (5, 4, 1, 2, 0, 3, 6)), (8 * S[5], 16 * S[2]))
