"""INT4 and INT2 codes of one token's head, two fp16 values an instruction.

Meaning: `reference._int4` and `._int2`, to the bit. A word of 32 bits holds two columns of a
head in fp16. They lie P columns apart, so that the codes of P words fall into the lower and the
upper half of one: shifted and added up they are packed.

What values are multiplied with is the largest fp16 number of which an exact product stays below a
bound. So it does not matter how a first guess is found, nor that a GPU only approximates it.

Shape letters: R rows (heads of tokens), L columns of a chunk, U packed units of a chunk, P words
of a unit.
"""

import triton
import triton.language as tl

from ckptq.kernels.rounding import INTERPRETED, round_half_even
from ckptq.kernels.token_head.kv_format import LEAST_HALF, THRESHOLD
from ckptq.kernels.words import both, of_two, word_of

WIDTH = tl.constexpr(3 * THRESHOLD)
"""Three times where INT2's outer levels begin: codes are 3 * (x / (WIDTH * sigma) + 1/2)."""
LEAST = tl.constexpr(LEAST_HALF)
BIAS = tl.constexpr(0x66006600)
"""1536.0 twice. Near it fp16 numbers have no bits below one: added, it leaves a whole number."""
LEAST_MEAN = tl.constexpr(2.0**-60)
"""No mean square is smaller: a head of zeros has a root and an inverse of it."""


@triton.jit
def halves(low, high):
    """Words of two tensors of fp32, rounded to fp16."""
    if INTERPRETED:
        return word_of(low.to(tl.float16), high.to(tl.float16))
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def words_of(x_RL, P: tl.constexpr):
    """fp32 [R, L] -> words [R, U, P]."""
    ROWS: tl.constexpr = x_RL.shape[0]
    x_RU2P = tl.reshape(x_RL, (ROWS, x_RL.shape[1] // (2 * P), 2, P))
    low_RUP, high_RUP = tl.split(tl.trans(x_RU2P, (0, 1, 3, 2)))
    return halves(low_RUP, high_RUP)


@triton.jit
def _smaller(a, b):
    return of_two(a, b, "min.f16x2 $0, $1, $2;")


@triton.jit
def _larger(a, b):
    return of_two(a, b, "max.f16x2 $0, $1, $2;")


@triton.jit
def _extrema(words):
    """fp32 [R] each: the smallest and the largest value of a tuple of tensors of words."""
    if INTERPRETED:
        low, high = both(words[0], tl.float16)
        low, high = tl.minimum(low, high), tl.maximum(low, high)
        for i in tl.static_range(1, len(words)):
            one, other = both(words[i], tl.float16)
            low = tl.minimum(low, tl.minimum(one, other))
            high = tl.maximum(high, tl.maximum(one, other))
        low_R, high_R = tl.min(tl.min(low, 2), 1), tl.max(tl.max(high, 2), 1)
        return low_R.to(tl.float32), high_R.to(tl.float32)
    else:
        low, high = words[0], words[0]
        for i in tl.static_range(1, len(words)):
            low, high = _smaller(low, words[i]), _larger(high, words[i])
        one_R, other_R = both(tl.reduce(tl.reduce(low, 2, _smaller), 1, _smaller), tl.float16)
        low_R = tl.minimum(one_R.to(tl.float32), other_R.to(tl.float32))
        one_R, other_R = both(tl.reduce(tl.reduce(high, 2, _larger), 1, _larger), tl.float16)
        return low_R, tl.maximum(one_R.to(tl.float32), other_R.to(tl.float32))


@triton.jit
def _roughly(x, OP: tl.constexpr):
    """1 / x or 1 / sqrt(x) ("rcp", "rsqrt") of normal numbers, within 2^-22 of itself."""
    if INTERPRETED:
        return 1.0 / (tl.sqrt(x) if OP == "rsqrt" else x)
    else:
        return tl.inline_asm_elementwise(
            OP + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _half_below(x):
    """fp32, positive and normal in fp16 -> fp16, toward zero."""
    if INTERPRETED:
        near = x.to(tl.float16)
        return _before_if(near, near.to(tl.float32) > x)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rz.f16.f32 $0, $1;", "=h,f", [x], tl.float16, is_pure=True, pack=1
        )


@triton.jit
def _before_if(x, condition):
    """The fp16 number before x > 0 where the condition holds."""
    return (x.to(tl.int16, bitcast=True) - condition.to(tl.int16)).to(tl.float16, bitcast=True)


@triton.jit
def _exceeds(a, b, bound: tl.constexpr):
    """Whether a * b > bound, exactly: a sum that is rounded once keeps its sign."""
    if INTERPRETED:
        return a.to(tl.float64) * b.to(tl.float64) > bound
    else:
        return tl.fma(a, b, -bound) > 0.0


@triton.jit
def int4_step_inverse_zero(words):
    """Steps and zero points fp32 [R], what values are multiplied with fp16 [R]."""
    low_R, high_R = _extrema(words)
    low_R, high_R = tl.minimum(low_R, 0.0), tl.maximum(high_R, 0.0)
    step_R = (high_R - low_R) * (1.0 / 15)
    # a thousandth short, so that no code leaves 0 to 15 and none has to be clamped
    BOUND: tl.constexpr = 0.9990000128746033
    divisor_R = tl.maximum(step_R, LEAST)
    guess_R = _half_below(_roughly(divisor_R, "rcp") * (BOUND * 1.000001))
    inverse_R = _before_if(guess_R, _exceeds(guess_R.to(tl.float32), divisor_R, BOUND))
    zero_R = round_half_even(-low_R * inverse_R.to(tl.float32)).to(tl.float32)
    return step_R, inverse_R, zero_R


@triton.jit
def int2_step_inverse(mean_R, GAIN: tl.constexpr):
    """Steps fp32 [R], what values are multiplied with fp16 [R], of the mean square before a
    rotation that multiplies values with GAIN on average."""
    root_R = _roughly(mean_R, "rsqrt")
    if INTERPRETED:
        step_R = tl.sqrt(mean_R)
    else:
        # one step of Newton's makes the nearest of it, as in the square root of CUDA
        step_R = mean_R * root_R
        step_R = tl.fma(tl.fma(-step_R, step_R, mean_R), root_R * 0.5, step_R)
    square_R = mean_R * (GAIN * WIDTH) * (GAIN * WIDTH)
    guess_R = _half_below(tl.minimum(root_R * (1.000001 / (GAIN * WIDTH)), 1.0 / LEAST))
    # 22 bits, so this product is exact
    inverse_square_R = guess_R.to(tl.float32) * guess_R.to(tl.float32)
    return step_R, _before_if(guess_R, _exceeds(inverse_square_R, square_R, 1.0))


@triton.jit
def _times_plus(word, factor, shift):
    """word * factor + shift in both halves, each rounded once."""
    if INTERPRETED:
        low, high = both(word, tl.float16)
        times, plus = both(factor, tl.float16)[0].to(tl.float64), both(shift, tl.float16)[0]
        low, high = low.to(tl.float64) * times + plus, high.to(tl.float64) * times + plus
        return word_of(low.to(tl.float16), high.to(tl.float16))
    else:
        factor, shift = tl.broadcast_to(factor, word.shape), tl.broadcast_to(shift, word.shape)
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [word, factor, shift],
            tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _place(word, factor):
    """word * factor + 1/2 in both halves, each between 0 and 1, rounded once."""
    if INTERPRETED:
        low, high = both(word, tl.float16)
        times = both(factor, tl.float16)[0].to(tl.float64)
        low = tl.clamp(low.to(tl.float64) * times + 0.5, 0.0, 1.0)
        high = tl.clamp(high.to(tl.float64) * times + 0.5, 0.0, 1.0)
        return word_of(low.to(tl.float16), high.to(tl.float16))
    else:
        # the clamp costs nothing so
        asm: tl.constexpr = (
            "{.reg .b32 half; mov.b32 half, 0x38003800; fma.rn.sat.f16x2 $0, $1, $2, half;}"
        )
        return of_two(word, tl.broadcast_to(factor, word.shape), asm)


@triton.jit
def packed(word_RUP, inverse_R, zero_R, KIND: tl.constexpr, BITS: tl.constexpr, AWAY: tl.constexpr):
    """Codes of a chunk, the first of a unit in its lowest bits: int32 [R, U], or int16 where the
    codes of a unit fill 16 bits. INT2 takes no zero points. AWAY: `take_away` of P and BITS."""
    P: tl.constexpr = word_RUP.shape[2]
    factor_R11 = word_of(inverse_R, inverse_R)[:, None, None]
    if KIND == "int4":
        shift_R = (zero_R + 1536.0).to(tl.float16)
        code_RUP = _times_plus(word_RUP, factor_R11, word_of(shift_R, shift_R)[:, None, None])
    else:
        three = tl.full((1, 1, 1), 0x42004200, tl.int32)  # 3.0 twice
        bias = tl.full((1, 1, 1), BIAS, tl.int32)
        code_RUP = _times_plus(_place(word_RUP, factor_R11), three, bias)
    sum_RU = tl.sum(code_RUP << (BITS * tl.arange(0, P))[None, None, :], 2)
    unit_RU = sum_RU + AWAY
    if 2 * P * BITS == 32:
        return unit_RU
    else:
        return (unit_RU | (unit_RU >> 8)).to(tl.int16)


def take_away(words: int, bits: int) -> int:
    """Minus what the shifted biases of so many words add up to, as an int32."""
    biases = BIAS.value * sum(1 << bits * i for i in range(words))
    return (0x80000000 - biases) % 0x100000000 - 0x80000000
