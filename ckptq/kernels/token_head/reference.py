"""What KV-cache formats mean, in plain torch: rotate, quantize, pack, and back.

Everything is in a stated order, fp32 where nothing else is said, so that kernels can be equal to
the bit: the Walsh-Hadamard butterflies go from neighbours to halves, sums of squares from slice to
slice, and codes are x * (1 / step) plus the zero point, rounded, ties to even. `hadamard_matrix`
is the transform by its definition, in float64, against which the butterflies are held.

Before it is quantized a head is rotated exactly (`on_grid`): on a grid of 2^-16 of its largest
value or finer, sums of up to 256 values fit the 24 bits of fp32 and do not depend on their order,
so that tensor cores give them too. Bf16 has 8 bits, so only values below 2^-8 of the largest move.

Shape letters: D head dimension, N block of the rotation, W bytes of a head (D / codes per byte).
Leading dimensions are any (tokens, heads, ...), written as dots.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ckptq.kernels.token_head.kv_format import (
    CENTROIDS,
    EPS,
    FP8,
    INT2,
    INT8,
    LEAST_HALF,
    LEAST_STEP,
    THRESHOLD,
    KVFormat,
    Rotation,
    load_size,
    rotation_block,
)


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes uint8 [..., W], scales fp32 [...], zero points uint8 [...] or None."""

    code: Tensor
    scale: Tensor
    zero: Tensor | None


def hadamard_matrix(n: int) -> Tensor:
    """Orthonormal, float64 [n, n]: entry (i, j) is negative where i & j has an odd bit count."""
    rows = [[1.0 - 2.0 * ((i & j).bit_count() & 1) for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64) / n**0.5


def signs(head_dim: int) -> Tensor:
    """The fixed signs of `Rotation.SIGNED`, fp32 [D]: the last bit of a hash of the index."""
    return torch.tensor([1.0 - 2.0 * (_hash(i) & 1) for i in range(head_dim)])


@lru_cache(maxsize=16)
def _signs_on(head_dim: int, device: torch.device) -> Tensor:
    """Made once for a device: copying from the host makes it wait."""
    return signs(head_dim).to(device)


def _hash(i: int) -> int:
    h = i * 0x9E3779B1 & 0xFFFFFFFF
    h = (h ^ h >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    return h ^ h >> 13


def _butterflies(x: Tensor, block: int) -> Tensor:
    half = 1
    while half < block:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        half *= 2
    return x


@lru_cache(maxsize=16)
def _weights(head_dim: int, rotation: Rotation, device: torch.device) -> Tensor:
    norm = torch.full((head_dim,), rotation_block(head_dim) ** -0.5)
    return (signs(head_dim) * norm if rotation is Rotation.SIGNED else norm).to(device)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """fp32 [..., D] of x [..., D]."""
    x = x.float()
    if rotation is Rotation.NONE:
        return x
    weighted = x * _weights(x.shape[-1], rotation, x.device)
    return _butterflies(weighted, rotation_block(x.shape[-1]))


def unrotate(x: Tensor, rotation: Rotation) -> Tensor:
    """The inverse of `rotate`, fp32."""
    x = x.float()
    if rotation is Rotation.NONE:
        return x
    turned = _butterflies(x, rotation_block(x.shape[-1]))
    return turned * _weights(x.shape[-1], rotation, x.device)


def lift(x: Tensor) -> tuple[Tensor, Tensor]:
    """Heads [..., D] times a power of two, below 2^-8, fp32; its inverse [...].

    Exact up to 2^118; a head below 2^-40 stays smaller than others.
    """
    bits = x.float().abs().amax(-1).view(torch.int32)
    exponent = (bits & 0x7F800000).clamp(87 << 23, 244 << 23)
    factor = ((245 << 23) - exponent).view(torch.float32)
    return x.float() * factor[..., None], (exponent + (9 << 23)).view(torch.float32)


def rotate_exactly(lifted: Tensor, rotation: Rotation) -> Tensor:
    """Lifted heads [..., D], put on the grid and rotated without the norm: fp32, every sum exact.

    The rounding is fp16's, whose subnormals are the grid: of bf16 values only the small ones
    change, fp32 values keep 11 bits.
    """
    grid = lifted.half().float()
    if rotation is Rotation.SIGNED:
        grid = grid * _signs_on(grid.shape[-1], grid.device)
    # adding zero turns -0.0 into 0.0, as a matrix product does
    return _butterflies(grid, rotation_block(grid.shape[-1])) + 0.0


def _mean_square(x: Tensor) -> Tensor:
    """[...]: squares are added slice by slice, then neighbours."""
    size = load_size(x.shape[-1])
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    square = (padded * padded).unflatten(-1, (-1, size))
    total = square[..., 0, :]
    for i in range(1, square.shape[-2]):
        total = total + square[..., i, :]
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return _times(total[..., 0], 1.0 / x.shape[-1]).clamp_min(2.0**-60)


def pack(code: Tensor, per_byte: int) -> Tensor:
    """[..., D] codes of 8 / per_byte bits -> [..., W] bytes; the first code in the lowest bits."""
    shift = torch.arange(per_byte, device=code.device) * (8 // per_byte)
    return (code.long().unflatten(-1, (-1, per_byte)) << shift).sum(-1).to(torch.uint8)


def unpack(byte: Tensor, per_byte: int) -> Tensor:
    """The inverse of `pack`, int64 [..., D]."""
    bits = 8 // per_byte
    shift = torch.arange(per_byte, device=byte.device) * bits
    return (byte.long()[..., None] >> shift & (1 << bits) - 1).flatten(-2)


def quantize(x: Tensor, fmt: KVFormat, rotation: Rotation | None = None) -> Packed:
    """Quantize heads [..., D], each with a scale of its own. `rotation` replaces the format's."""
    fmt.width(x.shape[-1])
    rotation = fmt.rotation if rotation is None else rotation
    if fmt.bits == 8:
        return _eight_bits(x, fmt, rotation)
    lifted, unit = lift(x)
    turned, gain = lifted, 1.0
    if rotation is not Rotation.NONE:
        turned, gain = rotate_exactly(lifted, rotation), rotation_block(x.shape[-1]) ** 0.5
    if fmt == INT2:
        step, code = _int2(turned.half(), _mean_square(lifted), gain)
        return Packed(code, (step * unit).clamp_min(EPS), None)
    step, code, zero = _int4(turned.half())
    return Packed(code, (step * _times(unit, 1 / gain)).clamp_min(EPS), zero)


def _divide(x: Tensor, divisor: float) -> Tensor:
    """The nearest to x / divisor: by a plain number, torch on CUDA multiplies with its inverse."""
    return x / torch.full_like(x, divisor)


def _times(x: Tensor, factor: float) -> Tensor:
    """x times the fp32 number nearest to `factor`."""
    return x * torch.full((), factor, device=x.device)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _eight_bits(x: Tensor, fmt: KVFormat, rotation: Rotation) -> Packed:
    y, factor, least = x.float(), None, EPS
    if rotation is not Rotation.NONE:
        lifted, unit = lift(x)
        y, least = rotate_exactly(lifted, rotation), LEAST_STEP
        factor = _times(unit, rotation_block(x.shape[-1]) ** -0.5)
    step = _divide(y.abs().amax(-1), 127.0 if fmt == INT8 else 448.0)
    ratio = y * (1.0 / step.clamp_min(least))[..., None]
    code = ratio.round().to(torch.int8) if fmt == INT8 else _e4m3(ratio)
    scale = step if factor is None else step * factor
    return Packed(code.view(torch.uint8), scale.clamp_min(EPS), None)


def _int4(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of fp16 values."""
    low, high = y.amin(-1).float().clamp_max(0.0), y.amax(-1).float().clamp_min(0.0)
    step = _times(high - low, 1 / 15)
    # so short that codes stay within 0 to 15
    inverse = _half_below(torch.full_like(step, 0.999).double() / step.clamp_min(LEAST_HALF))
    zero = (-low.double() * inverse).round()
    code = (y.double() * inverse[..., None] + zero[..., None]).round()
    return step, pack(code, 2), zero.to(torch.uint8)


def _int2(y: Tensor, mean: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """Of fp16 values whose mean square is `mean` times the square of the gain."""
    third = gain * 3 * THRESHOLD
    width = _times(_times(mean, third), third)
    inverse = _half_below(width.double().rsqrt().clamp_max(1 / LEAST_HALF))
    # levels change at 1/6, 1/2 and 5/6
    place = _nearest_half((y.double() * inverse[..., None] + 0.5).clamp(0.0, 1.0))
    # by way of float64: torch's fp32 root on CPUs is not the nearest
    return mean.double().sqrt().float(), pack((place * 3).round(), 4)


def _half_below(x: Tensor) -> Tensor:
    """float64, positive and normal in fp16, rounded toward zero to what fp16 has."""
    ulp = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 11)
    return (x / ulp).floor() * ulp


def _nearest_half(x: Tensor) -> Tensor:
    """float64 in [0, 1], rounded once to what fp16 has: a cast goes by way of fp32."""
    ulp = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 11).clamp_min(-24))
    return (x / ulp).round() * ulp


@lru_cache(maxsize=16)
def _levels(device: torch.device) -> Tensor:
    near, far = CENTROIDS
    return torch.tensor([-far, -near, near, far], device=device)


def dequantize_rotated(packed: Packed, fmt: KVFormat) -> Tensor:
    """fp32 [..., D], still rotated: what attention multiplies with a rotated query."""
    if fmt == INT8:
        value = packed.code.view(torch.int8).float()
    elif fmt == FP8:
        value = packed.code.view(torch.float8_e4m3fn).float()
    elif fmt == INT2:
        value = _levels(packed.code.device)[unpack(packed.code, 4)]
    else:
        assert packed.zero is not None
        value = (unpack(packed.code, 2) - packed.zero.long()[..., None]).float()
    return value * packed.scale[..., None]


def there_and_back(x: Tensor, fmt: KVFormat, rotation: Rotation | None = None) -> Tensor:
    """Heads [..., D] as they come back from a cache, in their dtype."""
    return dequantize(quantize(x, fmt, rotation), fmt, rotation).to(x.dtype)


def dequantize(packed: Packed, fmt: KVFormat, rotation: Rotation | None = None) -> Tensor:
    """fp32 [..., D]: what was quantized, with its error."""
    rotation = fmt.rotation if rotation is None else rotation
    return unrotate(dequantize_rotated(packed, fmt), rotation)
