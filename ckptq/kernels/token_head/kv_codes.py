"""Codes of one token's head, and what they stand for.

INT8 and FP8 codes as both writing kernels make them; meaning: `reference._eight_bits`, to the bit.
A row (a head of a token) is a tuple of slices. A step is a scale before the power of two of a
rotated head is undone.

The values of all formats as attention multiplies them: in fp16 for queries of 16 bits, by moving
bits, two at a time. A byte or a nibble put beside the exponent of 1024 is 1024 and its value; E4M3
moved by a bit is fp16 over 256; the high bytes of INT2's levels are looked up by `prmt`. In pairs,
because a product takes neighbours along its sum from one register: two places of a key, or one of
two values.

Shape letters: R rows, L columns of a slice; X words of a thread.
"""

import triton
import triton.language as tl

from ckptq.kernels.rounding import INTERPRETED, e4m3_code, e4m3_value, narrow, round_half_even
from ckptq.kernels.token_head.kv_format import CENTROIDS
from ckptq.kernels.words import both

NEAR, FAR = (tl.constexpr(magnitude) for magnitude in CENTROIDS)


@triton.jit
def step_and_inverse(slices, KIND: tl.constexpr, LEAST: tl.constexpr):
    """Steps, and what values are multiplied with: fp32 [R]."""
    HALF_RANGE: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
    amax_RL = tl.abs(slices[0])
    for i in tl.static_range(1, len(slices)):
        amax_RL = tl.maximum(amax_RL, tl.abs(slices[i]))
    step_R = tl.math.div_rn(tl.max(amax_RL, 1), HALF_RANGE)
    return step_R, tl.math.div_rn(1.0, tl.maximum(step_R, LEAST))


@triton.jit
def codes(x_RL, inverse_R, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of one slice, uint8 [R, L]."""
    ratio_RL = x_RL * inverse_R[:, None]
    if KIND == "fp8":
        return e4m3_code(ratio_RL, NATIVE)
    else:
        return round_half_even(ratio_RL).to(tl.uint8)


_INT8 = "\n".join(
    f"""{{.reg .b32 pair;
prmt.b32 pair, $4, $5, {0x0400 + 0x0101 * i:#x};
lop3.b32 pair, pair, 0x00FF00FF, $6, 0x6A;
add.rn.f16x2 ${i}, pair, $7;}}"""
    for i in range(4)
)

_FP8 = "\n".join(
    f"""{{.reg .b32 pair, moved;
prmt.b32 pair, $4, $5, {0x4000 + 0x1010 * i:#x};
shr.b32 moved, pair, 1;
and.b32 moved, moved, 0x3F803F80;
lop3.b32 ${i}, pair, 0x80008000, moved, 0xEA;}}"""
    for i in range(4)
)


def _int4(place: int) -> str:
    """Marlin's: beside the exponent of 1024 a code is 1024 and its value, or 16 times its value."""
    mask, factor, bias = (0xF, 0x3C00, 0xE400) if place == 0 else (0xF0, 0x2C00, 0xD400)
    lines = ["{", ".reg .b32 half<4>, factor, bias;"]
    lines += [f"mov.b32 factor, {factor * 0x10001:#x};", f"mov.b32 bias, {bias * 0x10001:#x};"]
    lines += ["prmt.b32 half0, $4, $5, 0x5410;", "prmt.b32 half2, $4, $5, 0x7632;"]
    lines += ["shr.b32 half1, half0, 8;", "shr.b32 half3, half2, 8;"]
    for i in range(4):
        lines += [f"lop3.b32 half{i}, half{i}, {mask * 0x10001:#x}, $6, 0xEA;"]
        lines += [f"fma.rn.f16x2 ${i}, half{i}, factor, bias;"]
    return "\n".join([*lines, "}"])


def _int2(place: int) -> str:
    """The high bytes of the levels are looked up; the low byte is the same for all."""
    lines = ["{", ".reg .b32 pair<4>;"]
    lines += ["prmt.b32 pair0, $4, $5, 0x5140;", "prmt.b32 pair2, $4, $5, 0x7362;"]
    for i in (0, 2):
        if place % 2:
            lines += [f"shr.b32 pair{i}, pair{i}, 2;"]
        lines += [f"and.b32 pair{i}, pair{i}, 0x33333333;", f"shr.b32 pair{i + 1}, pair{i}, 16;"]
    for i in range(4):
        lines += [f"prmt.b32 pair{i}, $6, $6, pair{i};"]
        lines += [f"prmt.b32 ${i}, pair{i}, $7, {0x3414 if place >= 2 else 0x2404:#x};"]
    return "\n".join([*lines, "}"])


DECODERS: dict[str, tuple[str | float, ...]] = {
    "int8": ("int8", 1.0, 0x64806480, 0xE480E480 - (1 << 32), _INT8),
    "fp8": ("fp8", 256.0, 0, 0, _FP8),
    "int4": ("int4", 1.0, 0x64006400, 0, *map(_int4, range(2))),
    "int2": ("int2", 0.40286, 0x433CBCC3, 0x7F7F7F7F, *map(_int2, range(4))),
}
"""Of each kind: its name, what a one of the decoded values stands for, two constants, and for each
place in a byte PTX that makes four pairs of fp16, one value of each word, of two words and those.

INT2's levels are right to 1.5e-4: they differ in their high bytes, their low bytes are 0x7F.
"""


@triton.jit
def _by_number(byte_NW, PLACE: tl.constexpr, KIND: tl.constexpr):
    """fp32: codes; for FP8 and INT2 what the codes stand for."""
    if KIND == "int8":
        return byte_NW.to(tl.int8, bitcast=True).to(tl.float32)
    elif KIND == "fp8":
        return e4m3_value(byte_NW)
    elif KIND == "int4":
        return ((byte_NW >> (4 * PLACE)) & 15).to(tl.float32)
    else:
        code_NW = (byte_NW >> (2 * PLACE)) & 3
        magnitude_NW = tl.where((code_NW == 0) | (code_NW == 3), FAR, NEAR)
        return tl.where(code_NW < 2, -magnitude_NW, magnitude_NW)


@triton.jit
def _pair(one, other, BYTE: tl.constexpr, PLACE: tl.constexpr, DECODER: tl.constexpr, dtype):
    KIND: tl.constexpr = DECODER[0]
    one = _by_number((one >> 8 * BYTE & 255).to(tl.uint8), PLACE, KIND) / DECODER[1]
    other = _by_number((other >> 8 * BYTE & 255).to(tl.uint8), PLACE, KIND) / DECODER[1]
    return tl.join(narrow(one, dtype), narrow(other, dtype))


@triton.jit
def _halves(word):
    one, other = both(word, tl.float16)
    return tl.join(one, other)


@triton.jit
def value_pairs(words, magic, PLACE: tl.constexpr, DECODER: tl.constexpr, dtype: tl.constexpr):
    """What the bytes of two words hold at one place: [4, 8, A, B, C, X] -> [4, 8, A, B, C, 4 X, 2].

    `magic` are the constants of the decoder.
    """
    one, other = words
    if INTERPRETED or dtype != tl.float16:
        p0 = _pair(one, other, 0, PLACE, DECODER, dtype)
        p1 = _pair(one, other, 1, PLACE, DECODER, dtype)
        p2 = _pair(one, other, 2, PLACE, DECODER, dtype)
        p3 = _pair(one, other, 3, PLACE, DECODER, dtype)
    else:
        asm: tl.constexpr = DECODER[4 + PLACE]
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            asm,
            "=r,=r,=r,=r,r,r,r,r",
            [one, other, magic[0], magic[1]],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        p0, p1, p2, p3 = _halves(p0), _halves(p1), _halves(p2), _halves(p3)
    pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # [..., X, 2, half of 4, which half]
    pairs = tl.trans(pairs, (0, 1, 2, 3, 4, 5, 7, 8, 6))
    S: tl.constexpr = one.shape
    return tl.reshape(pairs, (4, 8, S[2], S[3], S[4], 4 * S[5], 2))
