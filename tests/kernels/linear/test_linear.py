"""Quantized matrix products against dequantize-then-multiply in float64."""

import pytest
import reference_linear as meaning
import torch
from kernel_cases import weights
from reference_int4 import quantize_int4
from reference_quantize import quantize_blocks, quantize_rows
from torch import Tensor

from ckptq.kernels.linear import library
from ckptq.kernels.linear import linear_w4a16 as w4a16
from ckptq.kernels.linear.linear_w4a16 import linear_w4a16
from ckptq.kernels.linear.linear_w8a8 import linear_fp8_block, linear_w8a8

FP8, INT8 = torch.float8_e4m3fn, torch.int8
CODES = pytest.mark.parametrize("codes", [FP8, INT8], ids=["fp8", "int8"])
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 1), (3, 150, 200), (70, 65, 384)], ids=str)


def close(got: Tensor, want: Tensor) -> bool:
    """Equal up to a last place of bf16, or to 1e-4 of the largest result for what cancels."""
    got, want = got.cpu().double(), want.double()
    assert got.shape == want.shape
    bound = want.abs() * 2**-8 + want.abs().max() * 1e-4
    return bool(((got - want).abs() <= bound).all())


def operands(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    M, N, K = shape
    return weights((M, K), seed=1) * 30, weights((N, K), seed=2)


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


@CODES
@SHAPES
def test_per_token_times_per_channel(
    device: torch.device, shape: tuple[int, int, int], codes: torch.dtype
) -> None:
    a, w = operands(shape)
    args = (*quantize_rows(a, codes), *quantize_rows(w, codes))
    want = meaning.linear_w8a8(*args, torch.float64)
    assert close(linear_w8a8(*on(device, *args)), want)


@CODES
def test_sums_that_fp32_holds_are_exact(device: torch.device, codes: torch.dtype) -> None:
    """Small whole codes under scales that are powers of two: nothing is rounded anywhere."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-4, 5, (33, 300), generator=generator)
    w = torch.randint(-4, 5, (130, 300), generator=generator)
    a_scale = 2.0 ** torch.randint(-3, 4, (33, 1), generator=generator)
    w_scale = 2.0 ** torch.randint(-3, 4, (130, 1), generator=generator)
    args = (a.float().to(codes), a_scale, w.float().to(codes), w_scale)
    want = meaning.linear_w8a8(*args, torch.float32)
    assert torch.equal(linear_w8a8(*on(device, *args), torch.float32).cpu(), want)


@CODES
def test_one_scale_for_all(device: torch.device, codes: torch.dtype) -> None:
    a, w = operands((5, 40, 96))
    (a, _), (w, _) = quantize_rows(a, codes), quantize_rows(w, codes)
    scales = torch.tensor([0.25]), torch.tensor([2.0])
    want = meaning.linear_w8a8(a, scales[0], w, scales[1], torch.float64)
    got = linear_w8a8(*on(device, a, scales[0], w, scales[1]))
    assert close(got, want)


@SHAPES
def test_fp8_blocks_and_token_groups(device: torch.device, shape: tuple[int, int, int]) -> None:
    a, w = operands(shape)
    args = (*quantize_blocks(a, FP8, (1, 128)), *quantize_blocks(w, FP8))
    want = meaning.linear_fp8_block(*args, torch.float64)
    assert close(linear_fp8_block(*on(device, *args)), want)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((1, 1, 32), 32),
        ((3, 70, 192), 64),
        ((70, 65, 384), 128),
        ((300, 140, 320), 160),
        ((5, 9, 101), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_w4a16(
    device: torch.device,
    shape: tuple[int, int, int],
    group: int | None,
    symmetric: bool,
    source: torch.dtype,
) -> None:
    a, w = operands(shape)
    a, w = a.to(source), w.to(source)
    packed, scale, zero = quantize_int4(w, group, symmetric)
    want = meaning.linear_w4a16(a.double(), packed, scale, zero)
    got = linear_w4a16(*on(device, a, packed, scale), None if zero is None else zero.to(device))
    assert got.dtype == source
    assert close(got, want)


def test_w4a16_takes_features_in_the_order_of_threads() -> None:
    p = torch.arange(128)
    thread, word, of_word = p % 8 // 2, p // 32, p // 8 % 4
    order = 32 * thread + 8 * word + of_word + 4 * (p % 2)
    assert torch.equal(order.sort().values, torch.arange(128))
    a = torch.arange(256)[None].repeat(3, 1)
    got = w4a16._reordered(a, 16)
    assert torch.equal(got[:3], torch.cat((order, order + 128)).repeat(3, 1))
    assert not got[3:].any()
    # thread 0 of the first 16 places: the first word's weights 0 and 4, then 1 and 5
    assert order[[0, 1, 8, 9]].tolist() == [0, 4, 1, 5]
    assert order[[2, 3, 10, 11]].tolist() == [32, 36, 33, 37]


@pytest.mark.parametrize("kib", [99, 163, 227], ids=["sm_86", "sm_80", "sm_90"])
def test_w4a16_tiles_fit_into_shared_memory(kib: int) -> None:
    for tokens in (1, 16, 17, 33, 128, 5000):
        rows, columns, stages = w4a16._tile(tokens, kib << 10)
        assert stages * (256 * rows + 64 * columns) <= kib << 10
        assert stages >= 3
        assert rows >= min(tokens, 64)


def test_broken_scales_are_noticed(device: torch.device) -> None:
    """The tolerance can fail: scales off by a row, by a block, by a group."""
    a, w = operands((16, 256, 256))
    rows = (*quantize_rows(a), *quantize_rows(w))
    want = meaning.linear_w8a8(*rows, torch.float64)
    assert close(linear_w8a8(*on(device, *rows)), want)
    assert not close(linear_w8a8(*on(device, *rows[:3], rows[3].roll(1, 0))), want)

    blocks = (*quantize_blocks(a, FP8, (1, 128)), *quantize_blocks(w))
    want = meaning.linear_fp8_block(*blocks, torch.float64)
    assert close(linear_fp8_block(*on(device, *blocks)), want)
    assert not close(linear_fp8_block(*on(device, *blocks[:3], blocks[3].roll(1, 1))), want)

    packed, scale, _ = quantize_int4(w)
    want = meaning.linear_w4a16(a.double(), packed, scale)
    assert close(linear_w4a16(*on(device, a, packed, scale)), want)
    assert not close(linear_w4a16(*on(device, a, packed, scale.roll(1, 1))), want)


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    a, w = operands((4, 8, 64))
    args = on(device, *quantize_rows(a), *quantize_rows(w))
    with pytest.raises(ValueError, match="scales"):
        linear_w8a8(*args[:3], args[3][:5])
    with pytest.raises(ValueError, match="one dtype"):
        linear_w8a8(args[0].view(INT8), *args[1:])
    packed, scale, _ = on(device, *quantize_int4(w, 32)[:2], w)
    with pytest.raises(ValueError, match="does not fit"):
        linear_w4a16(a.to(device)[:, :48], packed, scale)
    with pytest.raises(ValueError, match="want activations and scales in"):
        linear_w4a16(a.to(device), packed, scale.float())


def test_zero_points_and_activations_are_read_by_their_own_strides(device: torch.device) -> None:
    a, w = operands((5, 24, 64))
    packed, scale, zero = quantize_int4(w, 32, False)
    want = meaning.linear_w4a16(a.double(), packed, scale, zero)
    wide, packed, scale, zero = on(device, torch.cat([a, a * 9], 1), packed, scale, zero)
    turned = zero.t().contiguous().t()
    assert close(linear_w4a16(wide[:, :64], packed, scale, turned), want)
    with pytest.raises(ValueError, match="packed zero points"):
        linear_w4a16(wide[:, :64], packed, scale, zero[:2])


def test_columns_that_lie_apart_are_refused(device: torch.device) -> None:
    """Strides of 0 and 2 are not two strides of 1."""
    a, w = operands((4, 8, 128))
    (a8, a_scale), (w8, w_scale) = (on(device, *quantize_rows(x)) for x in (a, w))
    one, apart = a8.view(torch.uint8)[:, :1].expand(4, 64).view(FP8), w8[:, ::2]
    with pytest.raises(ValueError, match="dense"):
        linear_w8a8(one, a_scale, apart, w_scale)
    with pytest.raises(ValueError, match="dense"):
        linear_fp8_block(one, a_scale, apart, w_scale[:1])


@pytest.mark.parametrize("zero_points", [False, True])
def test_int4_weights_of_many_tokens_are_decoded_first(
    device: torch.device, zero_points: bool
) -> None:
    a, w = weights((library.MANY, 96), seed=1), weights((24, 96), seed=2)
    packed, scale, zero = quantize_int4(w, 32, not zero_points)
    want = meaning.linear_w4a16(a, packed, scale, zero)
    held = on(device, a, packed, scale)
    got = library.linear_w4a16(*held, None if zero is None else zero.to(device))
    assert close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 256, 512), (1028, 128, 1024), (1028, 256, 384)], ids=str)
def test_blocks_of_many_tokens_by_cublas(device: torch.device, shape: tuple[int, int, int]) -> None:
    """The kernel and the library give the same; the last shape is not the library's."""
    a, w = operands(shape)
    args = on(device, *quantize_blocks(a, FP8, (1, 128)), *quantize_blocks(w, FP8))
    want = meaning.linear_fp8_block(*(x.cpu() for x in args), torch.float64)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    takes = library.multiplies_blocks(args[0], args[2], torch.bfloat16)
    assert takes == (hopper and shape[2] % 512 == 0)
    assert close(library.linear_fp8_block(*args), want)
    assert close(linear_fp8_block(*args), want)
