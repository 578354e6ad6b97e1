"""Rounding to the nearest code of an element type, ties to even, and the numbers that codes stand
for.

Quotients come in as float32 (float64 for float64 weights) that nobody else needs: they are
rounded in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptq.quantize.scales import E4M3_MAX

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_e4m3(x: Tensor) -> Tensor:
    """Saturating at 448. The sign of zero is kept: -0.0 is 0x80."""
    return x.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_int(x: Tensor, num_bits: int, zero_point: Tensor | None = None) -> Tensor:
    """int8 codes, saturating at -2^(bits-1) and 2^(bits-1) - 1."""
    if zero_point is not None:
        x.add_(zero_point)
    return x.clamp_(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1).round_().to(torch.int8)


def encode_e2m1(x: Tensor) -> Tensor:
    """uint8 codes 0..15, sign in bit 3, saturating at 6.

    A negative number that rounds to zero is -0 (8), but -0.0 is 0, as in compressed-tensors.
    Between 0 and 2 codes are 0.5 apart, to 4 they are 1 apart, to 6 they are 2 apart; the
    smallest of the three roundings is the right one, since the finer grid's count grows faster.
    """
    negative = x < 0
    x.abs_().clamp_(max=6.0)
    code = torch.minimum((x * 2).round_(), x.round().add_(2))
    code = torch.minimum(code, (x * 0.5).round_().add_(4)).to(torch.uint8)
    return code.bitwise_or_(negative.to(torch.uint8) << 3)


def decode_e2m1(code: Tensor) -> Tensor:
    """float32 of uint8 codes 0..15."""
    values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=code.device)
    return values[code.int()]
