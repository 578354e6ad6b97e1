"""What KV-cache formats mean, in plain torch: rotate, quantize, pack, and back.

Everything is in a stated order, fp32 where nothing else is said, so that kernels can be equal to
the bit: the Walsh-Hadamard butterflies go from neighbours to halves, sums of squares from slice to
slice, and codes are x * (1 / scale) plus the zero point, rounded, ties to even. `hadamard_matrix`
is the transform by its definition, in float64, against which the butterflies are held.

Shape letters: D head dimension, N block of the rotation, W bytes of a head (D / codes per byte).
Leading dimensions are any (tokens, heads, ...), written as dots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ckptq.kernels.kv_format import (
    CENTROIDS,
    EPS,
    FP8,
    INT2,
    INT8,
    THRESHOLD,
    KVFormat,
    Rotation,
    rotation_block,
    slice_size,
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


def _root_mean_square(y: Tensor) -> Tensor:
    """[...]: squares are added slice by slice, then neighbours."""
    square = (y * y).unflatten(-1, (-1, slice_size(y.shape[-1])))
    total = square[..., 0, :]
    for i in range(1, square.shape[-2]):
        total = total + square[..., i, :]
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    # by way of float64: torch's fp32 root on CPUs is not the nearest
    return _divide(total[..., 0], y.shape[-1]).double().sqrt().float()


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
    y = rotate(x, fmt.rotation if rotation is None else rotation)
    if fmt == INT2:
        return _quantize_int2(y)
    if fmt.asymmetric:
        return _quantize_int4(y)
    half_range = 127.0 if fmt == INT8 else 448.0
    scale = _divide(y.abs().amax(-1), half_range).clamp_min(EPS)
    ratio = y * (1.0 / scale)[..., None]
    code = ratio.round().to(torch.int8) if fmt == INT8 else _e4m3(ratio)
    return Packed(code.view(torch.uint8), scale, None)


def _divide(x: Tensor, divisor: float) -> Tensor:
    """The nearest to x / divisor: by a plain number, torch on CUDA multiplies with its inverse."""
    return x / torch.full_like(x, divisor)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _quantize_int4(y: Tensor) -> Packed:
    low, high = y.amin(-1).clamp_max(0.0), y.amax(-1).clamp_min(0.0)
    scale = _divide(high - low, 15.0).clamp_min(EPS)
    inverse = torch.full_like(scale, 0.999999) / scale  # so short that codes stay within 0 to 15
    zero = (-low * inverse).round()
    # in float64, as a fused multiply-add rounds once
    code = (y.double() * inverse.double()[..., None] + zero.double()[..., None]).round()
    return Packed(pack(code, 2), scale, zero.to(torch.uint8))


def _quantize_int2(y: Tensor) -> Packed:
    sigma = _root_mean_square(y).clamp_min(EPS)
    inverse = 1.0 / (sigma * THRESHOLD)
    code = (y * inverse[..., None] + 1.5).round().clamp(0.0, 3.0)  # levels change at -1, 0, 1
    return Packed(pack(code, 4), sigma, None)


def dequantize_rotated(packed: Packed, fmt: KVFormat) -> Tensor:
    """fp32 [..., D], still rotated: what attention multiplies with a rotated query."""
    if fmt == INT8:
        value = packed.code.view(torch.int8).float()
    elif fmt == FP8:
        value = packed.code.view(torch.float8_e4m3fn).float()
    elif fmt == INT2:
        near, far = CENTROIDS
        levels = torch.tensor([-far, -near, near, far], device=packed.code.device)
        value = levels[unpack(packed.code, 4)]
    else:
        assert packed.zero is not None
        value = (unpack(packed.code, 2) - packed.zero.long()[..., None]).float()
    return value * packed.scale[..., None]


def dequantize(packed: Packed, fmt: KVFormat, rotation: Rotation | None = None) -> Tensor:
    """fp32 [..., D]: what was quantized, with its error."""
    rotation = fmt.rotation if rotation is None else rotation
    return unrotate(dequantize_rotated(packed, fmt), rotation)
