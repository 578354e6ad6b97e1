"""INT8 and FP8 codes of one token's head, as both writing kernels use.

Meaning: `reference._eight_bits`, to the bit. A row (a head of a token) is a tuple of slices. A
step is a scale before the power of two of a rotated head is undone.

Shape letters: R rows, L columns of a slice.
"""

import triton
import triton.language as tl

from ckptq.kernels.rounding import e4m3_code, round_half_even


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
