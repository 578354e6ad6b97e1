"""Tiles of heads as threads hold them, from the load to a power of two that makes them all alike.

A head is loaded as slices of S columns, bf16 as words of two. A lifted slice is a pair of fp32
tensors, its even and its odd columns: halves of a word need no move between threads.

The rows of a tile are those of a product (`product_rows`).

Shape letters: T tokens, K key/value heads, D head dimension; R rows of a tile (heads of tokens),
S columns (or words) of a slice.
"""

import triton
import triton.language as tl

from ckptq.kernels.product_rows import in_order, product_rows
from ckptq.kernels.quantize.slices import absmax_of
from ckptq.kernels.rounding import INTERPRETED, widen
from ckptq.kernels.words import of_two


@triton.jit
def tile_rows(HEADS: tl.constexpr, WARPS: tl.constexpr):
    """Token and head of each row of a tile, [8, WARPS, 2]."""
    row = product_rows(WARPS)
    return row // HEADS, row % HEADS


@triton.jit
def load_tile(
    x_ptr,
    tile,
    T,
    strides,
    K: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    S: tl.constexpr,
    SLICES: tl.constexpr,
    FAR: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The heads of a tile as SLICES of [R, S]; after the last token, the last one again."""
    token, head = tile_rows(HEADS, WARPS)
    first = tile // (K // HEADS) * (16 * WARPS // HEADS)
    if FAR:
        first = first.to(tl.int64)
    x_ptr += first * strides[0] + tile % (K // HEADS) * HEADS * strides[1]
    token = tl.minimum(token, (T - 1 - first).to(tl.int32))
    col_S = tl.arange(0, S)[None, None, None, :]
    ptrs = x_ptr + (token * strides[0] + head * strides[1])[:, :, :, None] + col_S
    slices = ()
    for s in tl.static_range(SLICES):
        if (s + 1) * S <= D:
            # each is read once
            x = tl.load(ptrs + s * S, eviction_policy="evict_first")
        else:
            x = tl.load(ptrs + s * S, mask=col_S < D - s * S, other=0)
        slices = slices + (in_order(x, WARPS),)  # type: ignore[assignment]  # noqa: RUF005
    return slices


@triton.jit
def loads_stay_before(x):
    """x, an integer: loads before it are not moved past it, to where fewer registers are in use.

    Then they are under way while a tile is rotated and quantized.
    """
    if INTERPRETED:
        return x
    else:
        asm: tl.constexpr = "bar.warp.sync 0xFFFFFFFF; mov.b32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r", [x], tl.int32, is_pure=False, pack=1)


@triton.jit
def _smaller(a, b):
    return of_two(a, b, "min.bf16x2 $0, $1, $2;")


@triton.jit
def _larger(a, b):
    return of_two(a, b, "max.bf16x2 $0, $1, $2;")


@triton.jit
def _larger_absolute(a, b):
    """The signs of the result are unset."""
    asm: tl.constexpr = "{.reg .b32 p, q; abs.bf16x2 p, $1; abs.bf16x2 q, $2; max.bf16x2 $0, p, q;}"
    return of_two(a, b, asm)


@triton.jit
def _times(word, factor):
    """Even and odd columns of words of bf16 times words of a power of two, in fp32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 nothing, product;
        mov.b32 nothing, 0x80008000;
        fma.rn.bf16x2 product, $2, $3, nothing;
        shl.b32 $0, product, 16;
        and.b32 $1, product, 0xFFFF0000;
        }""",
        "=f,=f,r,r",
        [word, tl.broadcast_to(factor, word.shape)],
        (tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def exponents(slices, WORDS: tl.constexpr):
    """int32 [R]: the exponent bits of each row's largest absolute value, within bounds."""
    if WORDS:
        low, high = slices[0], slices[0]
        for i in tl.static_range(1, len(slices)):
            low, high = _smaller(low, slices[i]), _larger(high, slices[i])
        low_R, high_R = tl.reduce(low, 1, _smaller), tl.reduce(high, 1, _larger)
        best_R = _larger_absolute(low_R, high_R)
        bits_R = tl.maximum(best_R << 16, best_R) & 0x7F800000
    else:
        bits_R = tl.max(absmax_of(slices), 1).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits_R, 87 << 23), 244 << 23)


@triton.jit
def _lifted(x_RS, lift_R, WORDS: tl.constexpr):
    if WORDS:
        return _times(x_RS, (lift_R | (lift_R >> 16))[:, None])
    else:
        x_RS = widen(x_RS) * lift_R.to(tl.float32, bitcast=True)[:, None]
        return tl.split(tl.reshape(x_RS, (x_RS.shape[0], x_RS.shape[1] // 2, 2)))


@triton.jit
def lifted(slices, exponent_R, WORDS: tl.constexpr):
    """Slices as pairs of fp32 [R, S / 2], times powers of two: below 2^-8."""
    lift_R = (245 << 23) - exponent_R
    return [_lifted(x_RS, lift_R, WORDS) for x_RS in slices]


@triton.jit
def whole(pair):
    """A slice of its even and odd columns, fp32 [R, S]."""
    x_RP2 = tl.join(pair[0], pair[1])
    return tl.reshape(x_RP2, (x_RP2.shape[0], 2 * x_RP2.shape[1]))


@triton.jit
def _plus_square(total, x, EXACT: tl.constexpr):
    return tl.fma(x, x, total) if EXACT else total + x * x


@triton.jit
def mean_square(pairs, D: tl.constexpr, STEPS: tl.constexpr, EXACT: tl.constexpr):
    """fp32 [R], in an order that the layout in registers cannot change: slices, then neighbours.

    S / 2 = 2^STEPS. Squares of values of 16 bits are exact.
    """
    even, odd = pairs[0][0] * pairs[0][0], pairs[0][1] * pairs[0][1]
    for i in tl.static_range(1, len(pairs)):
        even = _plus_square(even, pairs[i][0], EXACT)
        odd = _plus_square(odd, pairs[i][1], EXACT)
    total = even + odd
    for _ in tl.static_range(STEPS):
        # two at a time: in whichever order they are added, the sum is the same
        total = tl.sum(tl.reshape(total, (total.shape[0], total.shape[1] // 2, 2)), 2)
    return tl.reshape(total, (total.shape[0],)) * (1.0 / D)
