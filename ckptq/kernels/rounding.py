"""Rounding shared by the kernels: fp32 to E4M3 codes and integers, nearest, ties to even.

No helper relies on how a compiler or the interpreter casts to FP8: the interpreter of Triton 3.9
rounds fp32 to float8e4nv wrongly, and sm_80 has no such cast. `e4m3_code` works on the bits, and
on GPUs that have the cast (sm_89 and later) takes it instead, which needs a tenth of the
instructions; both give the same code for every finite input, and a test tries them against torch.
Codes travel as uint8; launchers view them as torch.float8_e4m3fn.

Finite input only: the reader refuses NaN and Inf. An Inf saturates, a NaN gives some code.

Triton fuses `a * b + c` by default and a fused rounding moves ties, so every launch of a kernel
that uses these passes `enable_fp_fusion=False`.

`widen` and `narrow` stand where `.to(tl.float32)` and `.to(dtype)` would: the interpreter cuts fp32
to bf16 instead of rounding it, and misreads bf16 subnormals.
"""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def has_native_e4m3(device: torch.device) -> bool:
    """Whether Triton may cast fp32 to E4M3 itself there: CUDA from sm_89 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def widen(x):
    """bf16, fp16 or fp32 -> fp32, exact."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 -> bf16, fp16 or fp32, the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _e4m3_code_by_bits(x):
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448.0
    # normal: round away 20 of the 23 mantissa bits, then move the exponent bias from 127 to 7
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the grid is even, 2^-9 wide: as wide as the last bit of 2^14
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    code = tl.where(magnitude < 0x3C800000, subnormal - 0x46800000, normal)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


@triton.jit
def e4m3_code(x, NATIVE: tl.constexpr):
    """fp32 -> the E4M3 code (uint8) nearest to it, ties to even, saturating at 448."""
    if NATIVE:
        return x.to(tl.float8e4nv, fp_downcast_rounding="rtne").to(tl.uint8, bitcast=True)
    else:
        return _e4m3_code_by_bits(x)


@triton.jit
def _e4m3_value_by_bits(code):
    bits = code.to(tl.int32)
    normal = (((bits & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    # not the usual one product with 2^120: it reads fp32 subnormals, which may be flushed
    subnormal = (bits & 7).to(tl.float32) * 0.001953125  # 2^-9
    magnitude = tl.where((bits & 0x78) == 0, subnormal, normal)
    sign = (bits & 0x80) << 24
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_value(code, NATIVE: tl.constexpr = False):
    """The value in fp32 of a finite E4M3 code (uint8), exact; the sign of zero is kept."""
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return _e4m3_value_by_bits(code)


E4M3_IN_BF16 = """{
.reg .b32 x, y, sign, lift, zero;
mov.b32 lift, 0x7B807B80;
mov.b32 zero, 0x80008000;
prmt.b32 x, $2, 0, 0x1404;
prmt.b32 y, $2, 0, 0x3424;
and.b32 sign, x, 0x80008000;
shr.b32 x, x, 4;
and.b32 x, x, 0x07F007F0;
or.b32 x, x, sign;
fma.rn.bf16x2 $0, x, lift, zero;
and.b32 sign, y, 0x80008000;
shr.b32 y, y, 4;
and.b32 y, y, 0x07F007F0;
or.b32 y, y, sign;
fma.rn.bf16x2 $1, y, lift, zero;
}"""
"""PTX: the bf16 values of four finite codes, exact: exponent and mantissa moved, times 2^120."""
_E4M3_IN_BF16 = tl.constexpr(E4M3_IN_BF16)


@triton.jit
def e4m3_in(code, dtype: tl.constexpr):
    """The values of finite E4M3 codes (uint8) in bf16, fp16 or fp32, exact."""
    if INTERPRETED or dtype != tl.bfloat16:
        return narrow(e4m3_value(code), dtype)
    else:
        return tl.inline_asm_elementwise(
            _E4M3_IN_BF16, "=r,=r,r", [code], tl.bfloat16, is_pure=True, pack=4
        )


@triton.jit
def round_half_even(x):
    """fp32 -> the nearest int32, ties to even. Needs |x| <= 2^22."""
    # adding 1.5 * 2^23 leaves no bits below one; its own low 22 bits are zero
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def e4m3_round(x, NATIVE: tl.constexpr):
    """fp32 -> the nearest E4M3 value, still fp32: quantize and dequantize in one."""
    return e4m3_value(e4m3_code(x, NATIVE))


@triton.jit
def lift_and_reciprocal(scale):
    """What `divide_16bit` needs of a positive fp32 scale: a power of two and a reciprocal.

    The power of two keeps the reciprocal of a tiny or huge scale finite and normal.
    """
    lift = tl.where(scale < 5.421010862427522e-20, 18446744073709551616.0, 1.0)  # 2^-64, 2^64
    lift = tl.where(scale > 18446744073709551616.0, 5.421010862427522e-20, lift)
    return lift, tl.math.div_rn(1.0, scale * lift)


@triton.jit
def divide_16bit(x, lift, reciprocal):
    """x / scale where both were bf16 or fp16: near enough to round to E4M3 correctly.

    An IEEE division is ten instructions, this is four. The product is within two units in the
    last place of the quotient. A quotient of two numbers of 11 bits that is not a tie (a number
    of 5 bits, between two E4M3 values) is away from it by at least 2^-17 of itself, one that is a
    tie has zero low bits: so rounding off three bits restores every tie and makes none. Not for
    fp32 values or scales, which can come closer than that.
    """
    bits = ((x * lift) * reciprocal).to(tl.int32, bitcast=True)
    return ((bits + 4) & -8).to(tl.float32, bitcast=True)
