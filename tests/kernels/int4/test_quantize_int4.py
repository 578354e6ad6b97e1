"""INT4 groups, packing and zero points: every word equal to its meaning in plain torch."""

import pytest
import reference_int4 as meaning
import torch
from kernel_cases import same, weights
from torch import Tensor

from ckptq.kernels.int4.quantize_int4 import dequantize_int4, quantize_int4

SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
SOURCES = pytest.mark.parametrize(
    "source", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
Quantized = tuple[Tensor, Tensor, Tensor | None]


def all_same(got: Quantized, want: Quantized) -> bool:
    if (got[2] is None) != (want[2] is None):
        return False
    return all(same(g, w) for g, w in zip(got, want, strict=True) if g is not None)


@SYMMETRY
@SOURCES
@pytest.mark.parametrize(
    ("shape", "group"),
    [((1, 32), 32), ((9, 192), 64), ((13, 384), 128), ((8, 61), None), ((3, 1100), None)],
    ids=str,
)
def test_quantize_pack_and_back(
    device: torch.device,
    shape: tuple[int, int],
    group: int | None,
    source: torch.dtype,
    symmetric: bool,
) -> None:
    x = weights(shape, source)
    got = quantize_int4(x.to(device), group, symmetric)
    want = meaning.quantize_int4(x, group, symmetric)
    assert all_same(got, want)
    back = dequantize_int4(got[0], got[1], shape[1], got[2])
    assert same(back, meaning.dequantize_int4(want[0], want[1], shape[1], want[2]))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@SYMMETRY
def test_every_sixteen_bit_value_in_groups_of_its_size(
    device: torch.device, source: torch.dtype, symmetric: bool
) -> None:
    """Neighbours in order are of one size, so all codes and many ties occur, subnormals too."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source)
    x = torch.where(every.isfinite(), every, 0).view(-1, 256)
    x = torch.cat([x, x.flip(0) * 0.25], 1)
    got = quantize_int4(x.to(device), 32, symmetric)
    assert all_same(got, meaning.quantize_int4(x, 32, symmetric))


def test_ranges_that_do_not_straddle_zero(device: torch.device) -> None:
    """All positive, all negative, zero, and so small that the scale comes out as zero."""
    x = weights((5, 64)).abs()
    x[1] *= -1
    x[2] = 0.0
    x[3] = 2.0**-133
    x[4] = -(2.0**-133)
    got = quantize_int4(x.to(device), 64, False)
    assert all_same(got, meaning.quantize_int4(x, 64, False))
    zero = meaning.unpack_columns(got[2].cpu().t(), 5)[0]
    assert zero.tolist() == [-8, 7, 0, 0, 7]


def test_golden_words(device: torch.device) -> None:
    """-8 to 7 in order are 0x76543210 and 0xfedcba98; a short row ends in zero bits, not in 8s."""
    codes = torch.arange(-8.0, 8)
    codes[0] = -7.5  # a tie, to -8; 7.5 over half the range is a scale of 1
    packed, scale, zero = quantize_int4(codes[None].to(device), None)
    assert scale.tolist() == [[1.0]]
    words = [f"{word & 0xFFFFFFFF:08x}" for word in packed[0].tolist()]
    assert words == ["76543210", "fedcba98"]
    assert zero is None
    packed, _, _ = quantize_int4(torch.full((1, 10), 7.5, device=device), None)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in packed[0].tolist()] == ["ffffffff", "000000ff"]


def test_golden_zero_points(device: torch.device) -> None:
    """A range of -4 to 11 has scale 1 and zero point -4, stored as 4; rows 8 to 15 start a word."""
    x = torch.zeros(9, 32)
    x[:, 0], x[:, 1] = -4.0, 11.0
    x[1, 0], x[1, 1] = 0.0, 15.0  # zero point -8, stored as 0
    _, scale, zero = quantize_int4(x.to(device), 32, False)
    assert scale.unique().tolist() == [1.0]
    assert [f"{word & 0xFFFFFFFF:08x}" for word in zero.flatten().tolist()] == [
        "44444404",
        "00000004",
    ]


def test_a_forgotten_zero_point_is_noticed(device: torch.device) -> None:
    x = weights((16, 64))
    x[:, :32] = x[:, :32].abs()
    packed, scale, zero = quantize_int4(x.to(device), 32, False)
    want = meaning.dequantize_int4(packed.cpu(), scale.cpu(), 64, zero.cpu())
    assert same(dequantize_int4(packed, scale, 64, zero), want)
    assert not same(dequantize_int4(packed, scale, 64), want)
    moved = zero.roll(1, 1)
    assert not same(dequantize_int4(packed, scale, 64, moved), want)


def test_groups_that_do_not_fit_are_refused(device: torch.device) -> None:
    x = weights((8, 96)).to(device)
    with pytest.raises(ValueError, match="group 64 does not fit"):
        quantize_int4(x, 64)
    packed, scale, _ = quantize_int4(x, 32)
    with pytest.raises(ValueError, match="do not fit"):
        dequantize_int4(packed, scale, 128)


def test_zero_points_are_read_by_their_own_strides(device: torch.device) -> None:
    """Of a checkpoint's tensor turned, and never of fewer rows than there are."""
    x = weights((24, 64))
    packed, scale, zero = quantize_int4(x.to(device), 32, False)
    turned = zero.t().contiguous().t()
    want = meaning.dequantize_int4(packed.cpu(), scale.cpu(), 64, zero.cpu())
    assert same(dequantize_int4(packed, scale, 64, turned), want)
    for wrong in (zero[:2], zero[:, :1], zero.t()):
        with pytest.raises(ValueError, match="packed zero points"):
            dequantize_int4(packed, scale, 64, wrong)
