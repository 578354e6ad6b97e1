"""What INT4 and INT2 multiply with: the largest fp16 number of which a product stays below a bound.

Held against that property in float64, where such products are exact, not against a formula.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.kv_format import LEAST_HALF, THRESHOLD
from ckptq.kernels.token_head.kv_halves import (
    int2_step_inverse,
    int4_step_inverse_zero,
    packed,
    take_away,
    words_of,
)

GAIN = 128**0.5


@triton.jit
def _int4_kernel(x_ptr, step_ptr, inverse_ptr, zero_ptr, ROWS: tl.constexpr):
    """Heads of 8 values."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_RL = tl.load(x_ptr + row_R[:, None] * 8 + tl.arange(0, 8)[None, :])
    step_R, inverse_R, zero_R = int4_step_inverse_zero((words_of(x_RL, 4),))
    tl.store(step_ptr + row_R, step_R)
    tl.store(inverse_ptr + row_R, inverse_R)
    tl.store(zero_ptr + row_R, zero_R)


@triton.jit
def _int2_kernel(mean_ptr, step_ptr, inverse_ptr, GAIN: tl.constexpr, ROWS: tl.constexpr):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    step_R, inverse_R = int2_step_inverse(tl.load(mean_ptr + row_R), GAIN)
    tl.store(step_ptr + row_R, step_R)
    tl.store(inverse_ptr + row_R, inverse_R)


@triton.jit
def _pack_kernel(code_ptr, out_ptr, KIND: tl.constexpr, BITS: tl.constexpr, AWAY: tl.constexpr):
    """Two rows whose values are their codes, or for INT2 a third of them less a half."""
    P: tl.constexpr = 16 // BITS
    row_R, o_L = tl.arange(0, 2), tl.arange(0, 4 * P)
    x_RL = tl.load(code_ptr + row_R[:, None] * (4 * P) + o_L[None, :]).to(tl.float32)
    if BITS == 2:
        x_RL = x_RL * 0.3334 - 0.5
    one_R, zero_R = tl.full((2,), 1.0, tl.float16), tl.zeros((2,), tl.float32)
    unit_RU = packed(words_of(x_RL, P), one_R, zero_R, KIND, BITS, AWAY)
    tl.store(out_ptr + row_R[:, None] * 2 + tl.arange(0, 2)[None, :], unit_RU)


def largest(inverse: Tensor, below: Tensor) -> bool:
    """Whether no fp16 number from `inverse` on is below the float64 bounds, and it is."""
    after = (inverse.view(torch.int16) + 1).view(torch.float16)
    return bool(((inverse.double() <= below) & (after.double() > below)).all())


def some(count: int, low: int, high: int, device: torch.device) -> Tensor:
    """fp32 numbers from 2^low to 2^high; on a GPU all mantissas, in turn."""
    if device.type == "cuda":
        count = 1 << 24
        mantissa = torch.arange(count, dtype=torch.int32) % (1 << 23)
    else:
        mantissa = torch.randint(1 << 23, (count,), generator=torch.Generator().manual_seed(0))
    exponent = torch.arange(count) // max(1, count // (high - low)) + 127 + low
    return (mantissa.int() | exponent.clamp_max(126 + high).int() << 23).view(torch.float32)


def test_int4(device: torch.device) -> None:
    extreme = some(1 << 12, -9, -1, device)
    x = torch.zeros(len(extreme), 8)
    x[:, 2], x[:, 5] = extreme.half(), -extreme.flip(0).half()
    step, zero = torch.empty(2, len(x), device=device)
    inverse = torch.empty(len(x), dtype=torch.float16, device=device)
    _int4_kernel[(len(x) // 64,)](x.to(device), step, inverse, zero, ROWS=64)
    step, inverse, zero = step.cpu(), inverse.cpu(), zero.cpu()
    low, high = x.amin(-1), x.amax(-1)
    assert torch.equal(step, (high - low) * torch.tensor(1 / 15))
    bound = torch.tensor(0.999).double() / step.double().clamp_min(LEAST_HALF)
    assert largest(inverse, bound)
    assert not largest((inverse.view(torch.int16) + 1).view(torch.float16), bound)
    assert torch.equal(zero.double(), (-low.double() * inverse.double()).round())
    codes = (x.double() * inverse.double()[:, None] + zero.double()[:, None]).round()
    assert codes.amin() == 0
    assert codes.amax() == 15


def test_int2(device: torch.device) -> None:
    mean = some(1 << 12, -27, -15, device)
    step = torch.empty(len(mean), device=device)
    inverse = torch.empty(len(mean), dtype=torch.float16, device=device)
    _int2_kernel[(len(mean) // 64,)](mean.to(device), step, inverse, GAIN=GAIN, ROWS=64)
    assert torch.equal(step.cpu(), mean.double().sqrt().float())
    width = torch.tensor(GAIN * 3 * THRESHOLD)
    square = ((mean * width) * width).double()
    inverse = inverse.cpu()
    after = (inverse.view(torch.int16) + 1).view(torch.float16)
    assert (inverse.double() ** 2 * square <= 1).all()
    assert (after.double() ** 2 * square > 1).all()


@pytest.mark.parametrize(("kind", "bits"), [("int4", 4), ("int2", 2)])
def test_packing_keeps_every_code_at_its_place(device: torch.device, kind: str, bits: int) -> None:
    code = torch.randint(1 << bits, (2, 64 // bits), generator=torch.Generator().manual_seed(1))
    out = torch.zeros(2, 2, dtype=torch.int32, device=device)
    away = take_away(16 // bits, bits)
    _pack_kernel[(1,)](code.to(device), out, KIND=kind, BITS=bits, AWAY=away)
    assert torch.equal(out.cpu().view(torch.uint8), kv.pack(code, 8 // bits))
    _pack_kernel[(1,)](code.to(device), out, KIND=kind, BITS=bits, AWAY=away + 1)
    assert not torch.equal(out.cpu().view(torch.uint8), kv.pack(code, 8 // bits))
