"""Rounding to the nearest code of an element type, ties to even, and the numbers codes stand for.

Quotients weight / scale + zero point come in as float32 (float64 for float64 weights) and are used
up: the rounding happens in their place.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ckptq.quantize.scales import E2M1_MAX, E4M3_MAX, FLOATS
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.tiles import BITS
from ckptq.quantize.weight_scheme import WeightScheme

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def rounded(x: Tensor, scheme: WeightScheme, scratch: Scratch) -> Tensor:
    """What a plain cast turns into codes: to float8_e4m3fn (which rounds) or to int8."""
    if scheme.type == "int":
        least, most = -(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1
        return x.clamp_(least, most).round_()
    if scheme.num_bits == 8:
        return x.clamp_(-E4M3_MAX, E4M3_MAX)
    return e2m1_codes(x, scratch)


def e2m1_codes(x: Tensor, scratch: Scratch) -> Tensor:
    """int8 0..15, sign in bit 3, saturating at 6.

    As in compressed-tensors, a negative number that rounds to zero is -0 (8), but -0.0 is 0.
    """
    bits = x.add_(0.0).view(BITS[x.itemsize])  # -0.0 becomes 0.0
    first = scratch.tensor("first", x.shape, x.dtype)
    second = scratch.tensor("second", x.shape, x.dtype)
    torch.bitwise_right_shift(bits, 8 * x.itemsize - 4, out=first.view(bits.dtype))
    sign = scratch.tensor("sign", x.shape, torch.int8).copy_(first.view(bits.dtype))
    # Up to 2 codes are 0.5 apart, up to 4 they are 1 apart, up to 6 they are 2 apart. Counted in
    # codes, the coarser grids start higher and grow slower: the right one gives the least count.
    # Added to a number that has no room for fractions, a count is rounded, and is its lowest bits.
    x.abs_().clamp_(max=E2M1_MAX)
    even = x.new_tensor(1.5 * 2 ** FLOATS[x.dtype][0])
    torch.add(even, x, alpha=2, out=first)
    torch.minimum(first, torch.add(even + 2, x, out=second), out=first)
    torch.minimum(first, torch.add(even + 4, x, alpha=0.5, out=x), out=first)
    code = scratch.tensor("e2m1", x.shape, torch.int8).copy_(first.view(bits.dtype))
    return code.bitwise_or_(sign.bitwise_and_(8))


def round_to_numbers(
    x: Tensor, zero_point: Tensor | None, scheme: WeightScheme, scratch: Scratch
) -> Tensor:
    """x in place to the nearest number that a code stands for, in units of its scale; ties to even.

    In the dtype of x. Numbers are codes, less the zero point where there is one.
    """
    if zero_point is not None:
        x.add_(zero_point.to(x.dtype))
    if scheme.type == "int":
        x.clamp_(-(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1).round_()
    elif scheme.num_bits == 8:
        x.clamp_(-E4M3_MAX, E4M3_MAX).copy_(x.to(torch.float8_e4m3fn))
    else:
        round_to_e2m1(x, scratch.tensor("step", x.shape, x.dtype))
    return x if zero_point is None else x.sub_(zero_point.to(x.dtype))


def round_to_e2m1(x: Tensor, step: Tensor) -> Tensor:
    """x in place to the nearest E2M1 number, ties to even, saturating at 6; `step` is overwritten.

    E2M1's numbers are 0.5 apart below 2, 1 below 4 and 2 from there on: half the power of two of
    the number, of 1 at least, which its exponent's bits hold.
    """
    mantissa, bias = FLOATS[x.dtype]
    bits, exponents = (
        x.clamp_(-E2M1_MAX, E2M1_MAX).view(BITS[x.itemsize]),
        step.view(BITS[x.itemsize]),
    )
    mask = ((1 << (8 * x.itemsize - 1 - mantissa)) - 1) << mantissa
    torch.bitwise_and(bits, mask, out=exponents)
    exponents.clamp_(min=bias << mantissa).sub_(1 << mantissa)
    return x.div_(step).round_().mul_(step)


def decode_e2m1(byte_RB: Tensor) -> Tensor:
    """float32 [R, 2 * B] of bytes of two codes, the first in the low bits."""
    pairs = _pairs(torch.tensor((*E2M1, *(-value for value in E2M1)))).to(byte_RB.device)
    made = pairs.index_select(0, byte_RB.reshape(-1).int())
    return made.view(torch.float32).view(len(byte_RB), -1)


def as_numbers(code: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes in a dtype to compute with, in new memory unless they are in that. On a CPU E4M3 is
    looked up, two codes at a time: the bits of torch's cast, in a tenth of its time."""
    flat = code.contiguous().view(-1)
    in_pairs = not (flat.numel() % 2 or flat.storage_offset() % 2) and dtype in PAIRS
    if code.dtype != torch.float8_e4m3fn or code.device.type != "cpu" or not in_pairs:
        return code.to(dtype)
    index = flat.view(torch.uint16).int()
    return _e4m3_pairs(dtype).index_select(0, index).view(dtype).view(code.shape)


PAIRS = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}
"""Dtype -> one that holds two of it."""


@cache
def _e4m3_pairs(dtype: torch.dtype) -> Tensor:
    """The numbers of all pairs of E4M3 codes; the first is the low byte."""
    return _pairs(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype))


def _pairs(every: Tensor) -> Tensor:
    """The numbers of all pairs of codes, given those of each code."""
    pairs = torch.stack((every.repeat(len(every)), every.repeat_interleave(len(every))), dim=1)
    return pairs.view(PAIRS[every.dtype]).view(-1)
