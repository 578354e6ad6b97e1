"""Codes of one token's head, and what they stand for.

INT8 and FP8 codes as both writing kernels make them; meaning: `reference._eight_bits`, to the bit.
A row (a head of a token) is a tuple of slices. A step is a scale before the power of two of a
rotated head is undone.

The values of all formats as attention multiplies them, in the query's dtype. In bf16 four bytes are
decoded at a time, in two words, by moving bits: a byte put beside 0x43 is 128 and its low seven
bits, and `prmt` looks up what two codes of INT2 stand for. Every value is exact, so this is
`_by_number` to the bit, with a quarter of the instructions.

Shape letters: R rows, L columns of a slice; N keys of a tile, W bytes of a head.
"""

import struct

import triton
import triton.language as tl

from ckptq.kernels.rounding import (
    E4M3_IN_BF16,
    INTERPRETED,
    e4m3_code,
    e4m3_value,
    narrow,
    round_half_even,
)
from ckptq.kernels.token_head.kv_format import CENTROIDS

NEAR, FAR = (tl.constexpr(magnitude) for magnitude in CENTROIDS)


@triton.jit
def step_and_inverse(slices, KIND: tl.constexpr, LEAST: tl.constexpr, COUNT: tl.constexpr):
    """Steps, and what values are multiplied with: fp32 [R]."""
    HALF_RANGE: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
    amax_RL = tl.abs(slices[0])
    for i in tl.static_range(1, COUNT):
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


def _bf16(value: float) -> int:
    """The bits of the nearest bf16."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _levels(shift: int) -> str:
    """A byte of each of INT2's four levels in bf16, as one word."""
    levels = (-CENTROIDS[1], -CENTROIDS[0], *CENTROIDS)
    return hex(sum((_bf16(level) >> shift & 255) << 8 * i for i, level in enumerate(levels)))


_INT8 = """{
.reg .b32 low, sign, above, minus;
mov.b32 minus, 0xBF80BF80;
and.b32 low, $2, 0x7F7F7F7F;
and.b32 sign, $2, 0x80808080;
prmt.b32 above, sign, 0x43434343, 0x4140;
prmt.b32 $0, low, 0x43434343, 0x4140;
fma.rn.bf16x2 $0, above, minus, $0;
prmt.b32 above, sign, 0x43434343, 0x4342;
prmt.b32 $1, low, 0x43434343, 0x4342;
fma.rn.bf16x2 $1, above, minus, $1;
}"""


def _int4(place: int) -> str:
    return f"""{{
.reg .b32 code, one, bias;
mov.b32 one, 0x3F803F80;
mov.b32 bias, 0xC300C300;
shr.b32 code, $2, {4 * place};
and.b32 code, code, 0x0F0F0F0F;
prmt.b32 $0, code, 0x43434343, 0x4140;
fma.rn.bf16x2 $0, $0, one, bias;
prmt.b32 $1, code, 0x43434343, 0x4342;
fma.rn.bf16x2 $1, $1, one, bias;
}}"""


def _int2(place: int) -> str:
    return f"""{{
.reg .b32 code, high, low;
shr.b32 code, $2, {2 * place};
and.b32 code, code, 0x03030303;
shl.b32 high, code, 4;
or.b32 code, code, high;
or.b32 code, code, 0x40404040;
mov.b32 low, {_levels(0)};
mov.b32 high, {_levels(8)};
prmt.b32 $0, low, high, code;
shr.b32 code, code, 16;
prmt.b32 $1, low, high, code;
}}"""


DECODERS: dict[str, tuple[str, ...]] = {
    "int8": (_INT8,),
    "fp8": (E4M3_IN_BF16,),
    "int4": tuple(map(_int4, range(2))),
    "int2": tuple(map(_int2, range(4))),
}
"""By the kind of a format: PTX for the values at each place of four bytes, two words of bf16."""


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
def values_at(
    byte_NW, PLACE: tl.constexpr, KIND: tl.constexpr, DECODER: tl.constexpr, dtype: tl.constexpr
):
    """What uint8 bytes [N, W] hold at one place, in bf16, fp16 or fp32."""
    if INTERPRETED or dtype != tl.bfloat16:
        return narrow(_by_number(byte_NW, PLACE, KIND), dtype)
    else:
        asm: tl.constexpr = DECODER[PLACE]
        return tl.inline_asm_elementwise(
            asm, "=r,=r,r", [byte_NW], tl.bfloat16, is_pure=True, pack=4
        )
