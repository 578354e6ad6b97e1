"""FP8 and INT8 kernels against their meaning in plain torch: equal codes, equal scales."""

import pytest
import reference_quantize as meaning
import torch
from kernel_cases import both_same, same, weights

from ckptq.kernels.quantize.quantize_rows import quantize_blocks, quantize_rows
from ckptq.kernels.quantize.quantize_static import dequantize, quantize_static

FP8, INT8 = torch.float8_e4m3fn, torch.int8
SHAPES = [(1, 1), (3, 62), (130, 257), (5, 4100)]
CODES = pytest.mark.parametrize("codes", [FP8, INT8], ids=["fp8", "int8"])
SOURCES = pytest.mark.parametrize(
    "source", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)


@CODES
@SOURCES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(
    device: torch.device, shape: tuple[int, int], source: torch.dtype, codes: torch.dtype
) -> None:
    x = weights(shape, source)
    assert both_same(quantize_rows(x.to(device), codes), meaning.quantize_rows(x, codes))


@CODES
def test_rows_too_long_for_one_program(device: torch.device, codes: torch.dtype) -> None:
    x = weights((3, 33_000))
    assert both_same(quantize_rows(x.to(device), codes), meaning.quantize_rows(x, codes))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_sixteen_bit_value_as_a_row_maximum_and_as_a_code(
    device: torch.device, source: torch.dtype
) -> None:
    """Scales from subnormal to infinite, and all codes under a scale of one."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source)
    every = torch.where(every.isfinite(), every, 0)
    x = torch.stack([every, every / 3, every / 100], 1)
    assert both_same(quantize_rows(x.to(device)), meaning.quantize_rows(x))
    x, one = every.view(256, 256), torch.ones(1, 1, dtype=source)
    for codes in (FP8, INT8):
        got = quantize_static(x.to(device), one.to(device), (256, 256), codes)
        assert same(got, meaning.quantize_static(x, one, (256, 256), codes))


@CODES
@SOURCES
@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (256, 128)], ids=str)
def test_blocks(
    device: torch.device, shape: tuple[int, int], source: torch.dtype, codes: torch.dtype
) -> None:
    x = weights(shape, source)
    assert both_same(quantize_blocks(x.to(device), codes), meaning.quantize_blocks(x, codes))


@CODES
@SOURCES
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tile", [(70, 240), (1, 240), (70, 80), (32, 32)], ids=str)
def test_static_scales_and_back(
    device: torch.device,
    tile: tuple[int, int],
    scales: torch.dtype,
    source: torch.dtype,
    codes: torch.dtype,
) -> None:
    """Per tensor, channel, head and block; small scales, so that codes saturate."""
    x = weights((70, 240), source)
    grid = [-(-size // side) for size, side in zip(x.shape, tile, strict=True)]
    scale = (torch.rand(grid, generator=torch.Generator().manual_seed(1)) * 0.001).to(scales)
    got = quantize_static(x.to(device), scale.to(device), tile, codes)
    want = meaning.quantize_static(x, scale, tile, codes)
    assert same(got, want)
    assert same(dequantize(got, scale.to(device), tile), meaning.dequantize(want, scale, tile))


def test_a_strided_input_is_read_by_its_strides(device: torch.device) -> None:
    whole = weights((9, 300))
    x = whole[:, 100:200]
    for got, want in (
        (quantize_rows, meaning.quantize_rows),
        (quantize_blocks, meaning.quantize_blocks),
    ):
        assert both_same(got(whole.to(device)[:, 100:200]), want(x))


def test_golden_bytes(device: torch.device) -> None:
    """By hand: amax 448 gives scale 1, codes 0x78 + ... ; amax 7 gives INT8 scale 7 / 127.5."""
    x = torch.tensor([[448.0, -1.0, 17.0, 19.0], [0.0, -0.0, 0.0, 0.0]]).bfloat16()
    code, scale = quantize_rows(x.to(device))
    assert code.view(torch.uint8).tolist() == [[0x7E, 0xB8, 0x58, 0x5A], [0, 0x80, 0, 0]]
    assert scale.tolist() == [[1.0], [0.0078125]]
    x = torch.tensor([[127.5, -127.5, 2.5, 3.5, -0.5]])
    code, scale = quantize_rows(x.to(device), INT8)
    assert code.tolist() == [[127, -128, 2, 4, 0]]
    assert scale.tolist() == [[1.0]]


def test_a_scale_off_by_one_row_is_noticed(device: torch.device) -> None:
    x = weights((40, 64))
    _, scale = meaning.quantize_rows(x)
    moved = scale.roll(1, 0)
    got = quantize_static(x.to(device), moved.to(device), (1, 64))
    assert not same(got, meaning.quantize_static(x, scale, (1, 64), FP8))


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    x = weights((8, 64)).to(device)
    with pytest.raises(ValueError, match="do not tile"):
        quantize_static(x, torch.ones(7, 1, device=device), (1, 64))
    with pytest.raises(ValueError, match="dense columns"):
        quantize_rows(x.t())
