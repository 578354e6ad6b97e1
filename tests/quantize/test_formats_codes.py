"""Codes are the nearest ones, as a search through a table of all values finds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ckptq.quantize.codes import E2M1, as_numbers, decode_e2m1, rounded
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.weight_scheme import WeightScheme

E4M3_MAGNITUDES = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).double()
FP8 = WeightScheme(format="float-quantized", num_bits=8, type="float", strategy="channel")
FP4 = WeightScheme(
    format="mxfp4-pack-quantized",
    num_bits=4,
    type="float",
    strategy="group",
    group_size=32,
    scale_dtype="uint8",
)


def ints(num_bits: int) -> WeightScheme:
    return WeightScheme(format="int-quantized", num_bits=num_bits, type="int", strategy="channel")


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index into ascending `values` of the nearest to each x, the even index on a tie."""
    distance = (x.double()[:, None] - values[None, :]).abs()
    best = distance.amin(1, keepdim=True)
    odd = torch.arange(len(values)) % 2
    return (distance > best).mul(2).add(odd).argmin(1)


def probes(values: Tensor) -> Tensor:
    """Every value, every midpoint, their neighbours in float32, and random numbers around them."""
    exact = torch.cat((values, (values[1:] + values[:-1]) / 2, values[-1:] * 8)).float()
    up = torch.nextafter(exact, torch.tensor(torch.inf))
    down = torch.nextafter(exact, torch.tensor(-torch.inf))
    largest = float(values[-1])
    random = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * largest * 1.1
    return torch.cat((exact, up, down, random, random.square() / largest, torch.tensor([1e-42])))


def test_e4m3_codes_are_nearest() -> None:
    x = probes(E4M3_MAGNITUDES).clamp(min=0)
    codes = rounded(x.clone(), FP8, Scratch()).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(codes.long(), nearest(x, E4M3_MAGNITUDES))
    negative = rounded(-x, FP8, Scratch()).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(negative.long(), codes.long() + 128)


def test_e2m1_codes_are_nearest() -> None:
    values = torch.tensor(E2M1).double()
    x = probes(values).clamp(min=0)
    codes = rounded(x.clone(), FP4, Scratch()).long()
    assert torch.equal(codes, nearest(x, values))
    negative = rounded(-x, FP4, Scratch()).long()
    assert torch.equal(negative, torch.where(x == 0, 0, codes + 8))
    every = [*E2M1, *(-value for value in E2M1)]
    byte_RB = torch.arange(256, dtype=torch.uint8)[:, None]
    assert decode_e2m1(byte_RB).tolist() == [[low, high] for high in every for low in every]


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_integer_codes_are_nearest(num_bits: int) -> None:
    values = torch.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1)).double()
    x = torch.cat((probes(values), -probes(values)))
    codes = rounded(x.clone(), ints(num_bits), Scratch()).to(torch.int8)
    # the first value is even, so an even index is an even code
    assert torch.equal(codes.long(), nearest(x, values) + int(values[0]))


def test_the_search_tells_ties_apart() -> None:
    """The judge must be able to fail: rounding ties upwards, or through float16, is not nearest."""
    values = torch.arange(-8, 8).double()
    x = probes(values)
    assert not torch.equal((x + 0.5).floor().clamp(-8, 7).long(), nearest(x, values) - 8)
    x = probes(E4M3_MAGNITUDES).clamp(min=0)
    twice = x.half().clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert not torch.equal(twice.long(), nearest(x, E4M3_MAGNITUDES))


def test_the_sign_of_zero() -> None:
    """Kept by E4M3, as in torch; in E2M1 -0.0 is 0 and a small negative is -0, as in theirs."""
    zeros = torch.tensor([0.0, -0.0, -1e-30])
    e4m3 = rounded(zeros.clone(), FP8, Scratch()).to(torch.float8_e4m3fn)
    assert e4m3.view(torch.uint8).tolist() == [0x00, 0x80, 0x80]
    assert rounded(zeros.clone(), FP4, Scratch()).tolist() == [0, 0, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_e4m3_code_is_the_number_of_torch_s_cast(dtype: torch.dtype) -> None:
    """NaN and both zeros too, also of a part that does not lie in one piece."""
    code = torch.arange(256, dtype=torch.uint8).view(16, 16).t().view(torch.float8_e4m3fn)
    made, cast = as_numbers(code, dtype), code.to(dtype)
    assert made.dtype == dtype
    assert torch.equal(made.contiguous().view(torch.uint8), cast.contiguous().view(torch.uint8))
