"""Codes of one token's head: scale, zero point, rounding and packing, as both writing kernels use.

Meaning: `reference.kv._eight_bits`, `._int4` and `._int2`, to the bit. A row (a head of a token) is
a tuple of slices. A step is a scale before the power of two of a rotated head is undone.

Shape letters: R rows, L columns of a slice, D head dimension, W halfwords of a slice.
"""

import triton
import triton.language as tl

from ckptq.kernels.kv_format import THRESHOLD
from ckptq.kernels.rounding import INTERPRETED, e4m3_code, round_half_even

THIRD = tl.constexpr(3 * THRESHOLD)
"""Three times where INT2's outer levels begin: codes are 3 * (x / (THIRD * sigma) + 1/2)."""


@triton.jit
def _nearest(x, factor, shift):
    """Bits whose low half is the whole number nearest to x * factor + shift, ties to even.

    One rounding: `shift` is whole, and so is the number 1.5 * 2^23 that leaves no bits below one.
    The interpreter does not fuse, so it computes in float64, where the product is exact.
    """
    if INTERPRETED:
        exact = x.to(tl.float64) * factor.to(tl.float64) + shift.to(tl.float64)
        whole = (exact + 6755399441055744.0) - 6755399441055744.0
        return (whole.to(tl.float32) + 12582912.0).to(tl.int32, bitcast=True)
    else:
        return tl.fma(x, factor, shift + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _largest(slices, COUNT: tl.constexpr):
    """[R]: the largest value of each row."""
    best = slices[0]
    for i in tl.static_range(1, COUNT):
        best = tl.maximum(best, slices[i])
    return tl.max(best, 1)


@triton.jit
def _absolute(slices, SIGN: tl.constexpr, COUNT: tl.constexpr):
    """|x| where SIGN is 0, else x times it."""
    changed = ()
    for i in tl.static_range(COUNT):
        x_RL = tl.abs(slices[i]) if SIGN == 0 else slices[i] * SIGN
        changed = changed + (x_RL,)  # type: ignore[assignment]  # noqa: RUF005
    return changed


@triton.jit
def _sigma(slices, D: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """[R], the root mean square, in an order that the layout in registers cannot change."""
    ROWS: tl.constexpr = slices[0].shape[0]
    L: tl.constexpr = slices[0].shape[1]
    total = slices[0] * slices[0]
    for i in tl.static_range(1, COUNT):
        total = total + slices[i] * slices[i]
    for step in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(total, (ROWS, L >> (step + 1), 2)))
        total = even + odd
    return tl.math.sqrt_rn(tl.reshape(total, (ROWS,)) * (1.0 / D))


@triton.jit
def step_inverse_zero(
    slices,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Steps, what values are multiplied with, zero points: fp32 [R]. L = 2^STEPS."""
    if KIND == "int4":
        low_R = -tl.maximum(_largest(_absolute(slices, -1, COUNT), COUNT), 0.0)
        step_R = (tl.maximum(_largest(slices, COUNT), 0.0) - low_R) * (1.0 / 15)
        # a millionth short, so that no code leaves 0 to 15 and none has to be clamped
        inverse_R = tl.math.div_rn(0.999999, tl.maximum(step_R, LEAST))
        zero_R = round_half_even(-low_R * inverse_R).to(tl.float32)
    elif KIND == "int2":
        step_R = _sigma(slices, D, COUNT, STEPS)
        inverse_R = tl.math.div_rn(1.0, tl.maximum(step_R, LEAST) * THIRD)
        zero_R = tl.zeros(step_R.shape, tl.float32)
    else:
        HALF_RANGE: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
        step_R = tl.math.div_rn(_largest(_absolute(slices, 0, COUNT), COUNT), HALF_RANGE)
        inverse_R = tl.math.div_rn(1.0, tl.maximum(step_R, LEAST))
        zero_R = tl.zeros(step_R.shape, tl.float32)
    return step_R, inverse_R, zero_R


@triton.jit
def _place(x, third):
    """x * third + 1/2 between 0 and 1, rounded once."""
    if INTERPRETED:
        exact = x.to(tl.float64) * third.to(tl.float64) + 0.5
        return tl.clamp(exact.to(tl.float32), 0.0, 1.0)
    else:
        # the clamp costs nothing so
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;",
            "=f,f,f",
            [x, tl.broadcast_to(third, x.shape)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def codes(x_RL, inverse_R1, zero_R1, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of one slice: bytes of FP8 and INT8; of INT4 and INT2 the low bits of int32."""
    if KIND == "int4":
        return _nearest(x_RL, inverse_R1, zero_R1)
    elif KIND == "int2":
        # zero points are zero
        return _nearest(_place(x_RL, inverse_R1), zero_R1 + 3.0, zero_R1)
    elif KIND == "fp8":
        return e4m3_code(x_RL * inverse_R1, NATIVE)
    else:
        return round_half_even(x_RL * inverse_R1).to(tl.uint8)


@triton.jit
def halfwords(code_RL, BITS: tl.constexpr):
    """Codes [R, L] -> halfwords [R, L * BITS / 16], the first code in the lowest bits.

    What else lies in the codes' bits, 1.5 * 2^23 in fp32, has nothing in its low half.
    """
    PER: tl.constexpr = 16 // BITS
    ROWS: tl.constexpr = code_RL.shape[0]
    COUNT: tl.constexpr = code_RL.shape[1] // PER
    shift_P = BITS * tl.arange(0, PER)
    code_RCP = tl.reshape(code_RL, (ROWS, COUNT, PER)) << shift_P[None, None, :]
    return tl.sum(code_RCP, 2).to(tl.int16)
