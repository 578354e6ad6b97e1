"""Words of 32 bits that hold two values of 16."""

import triton
import triton.language as tl

from ckptq.kernels.rounding import INTERPRETED


@triton.jit
def word_of(low, high):
    bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def both(word, dtype: tl.constexpr):
    """The lower and the upper value of words."""
    if INTERPRETED:
        low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
    else:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [word], (tl.int16, tl.int16), is_pure=True, pack=1
        )
    return low.to(dtype, bitcast=True), high.to(dtype, bitcast=True)


@triton.jit
def of_two(a, b, ASM: tl.constexpr):
    """What an instruction makes of two words."""
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
