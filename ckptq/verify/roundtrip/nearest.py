"""The nearest code, and the value of a code: a second implementation, independent of the converter.

Plain torch, as compressed-tensors defines it: divide by the scale, add the zero point, round half
to even, clamp; codes packed from the lowest bit on, integers offset to be unsigned. Only the format
description is shared with the converter, none of its arithmetic.

Shape letters: R rows, C columns, G groups, L columns in a group, W words; blocks of H x V elements
make a grid M x N. A tile is what shares one scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ckptq.quantize.weight_scheme import WeightScheme

TIE = 2.0**-20
"""Of the quotient: some eight units in the last place of float32."""

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False),
                (3.5, True), (5.0, False))  # fmt: skip
"""Midpoints of the grid, and whether a tie goes up, which it does where the code above is even."""


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E2M1 = torch.tensor((*E2M1_GRID, *(-value for value in E2M1_GRID)))
"""What each code stands for."""


def in_tiles(x_RC: Tensor, scheme: WeightScheme) -> Tensor:
    """[R, G, L]; [M, H, N, V] for blocks, filled up with zeros."""
    if scheme.block_structure is None:
        return x_RC.unflatten(1, (-1, scheme.group_size or x_RC.shape[1]))
    (R, C), (H, V) = x_RC.shape, scheme.block_structure
    return pad(x_RC, (0, -C % V, 0, -R % H)).unflatten(1, (-1, V)).unflatten(0, (-1, H))


def out_of_tiles(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Back to [R, C], without what `in_tiles` filled up."""
    if x.ndim == 3:
        return x.flatten(1)
    return x.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def per_tile(scale: Tensor, x: Tensor) -> Tensor:
    """[1], [R, G] or [M, N], shaped to be broadcast over the tiles `x`."""
    if scale.numel() == 1:
        return scale.reshape(1)
    return scale[:, None, :, None] if x.ndim == 4 else scale[..., None]


def unpacked(word_RW: Tensor, num_bits: int, columns: int) -> Tensor:
    """Signed codes [R, columns] out of int32 words; a code may cross the border of two words."""
    # flat first: a lone column counts as contiguous whatever its stride
    byte_RB = word_RW.contiguous().flatten().view(torch.uint8).view(len(word_RW), -1)
    if num_bits == 8:
        return byte_RB[:, :columns].to(torch.int16) - 128
    if num_bits == 4:
        return _nibbles(byte_RB)[:, :columns].to(torch.int8) - 8
    first = torch.arange(columns) * num_bits
    long_RW = pad(word_RW, (0, 1)).long() & 0xFFFFFFFF
    low, high = long_RW[:, first // 32], long_RW[:, first // 32 + 1]
    code_RC = (low | high << 32) >> (first % 32) & (2**num_bits - 1)
    return code_RC - 2 ** (num_bits - 1)


def values(held: Mapping[str, Tensor], scheme: WeightScheme, columns: int) -> Tensor:
    """The numbers that the codes stand for [R, C], before scale and zero point, in float32."""
    if scheme.codes == "weight":
        weight = held["weight"]
        return weight.float() if scheme.type == "int" else _looked_up(E4M3, weight)
    packed = held["weight_packed"]
    if scheme.type == "float":
        return _looked_up(E2M1, _nibbles(packed))
    return unpacked(packed, scheme.num_bits, columns).float()


def _nibbles(byte_RB: Tensor) -> Tensor:
    """The low half of each byte, then the high one."""
    return torch.stack((byte_RB & 15, byte_RB >> 4), dim=-1).flatten(1)


def _looked_up(table: Tensor, code: Tensor) -> Tensor:
    """By far faster than converting float8 one by one, and with wide indices than with narrow."""
    index = code.contiguous().view(torch.uint8).reshape(-1).long()
    return table.index_select(0, index).view(code.shape)


def zero_points(held: Mapping[str, Tensor], scheme: WeightScheme, rows: int) -> Tensor | None:
    """One for each scale; packed ones are packed along the rows."""
    if scheme.symmetric:
        return None
    zero_point = held["weight_zero_point"]
    if scheme.format != "pack-quantized":
        return zero_point
    return unpacked(zero_point.t().contiguous(), scheme.num_bits, rows).t()


def divisor(held: Mapping[str, Tensor], scheme: WeightScheme) -> Tensor:
    """What each tile is divided by; float32 where the stored scale is no float."""
    scale = held["weight_scale"]
    if scheme.scale_dtype == "uint8":
        return torch.exp2(scale.double() - 127).float()
    if scheme.strategy == "tensor_group":
        return scale.float() / held["weight_global_scale"].float()
    return scale


def recode(
    w_RC: Tensor, held: Mapping[str, Tensor], scheme: WeightScheme, dtype: torch.dtype
) -> Tensor:
    """The values [R, C] of the codes that dividing in `dtype` gives for the stored scales.

    In float32 these are the nearest; in bfloat16 they are what llm-compressor makes on a CPU.
    """
    quotient = _quotients(w_RC, held, scheme, dtype)
    return out_of_tiles(_rounded(quotient, scheme), tuple(w_RC.shape)).float()


def _quotients(
    w_RC: Tensor, held: Mapping[str, Tensor], scheme: WeightScheme, dtype: torch.dtype
) -> Tensor:
    """What is to be rounded, in tiles."""
    x = in_tiles(w_RC, scheme).to(dtype)
    quotient = x / per_tile(divisor(held, scheme), x).to(dtype)
    zero_point = zero_points(held, scheme, w_RC.shape[0])
    if zero_point is not None:
        quotient = quotient + per_tile(zero_point, x).to(dtype)
    return quotient


def as_near(
    value_RC: Tensor, w_RC: Tensor, held: Mapping[str, Tensor], scheme: WeightScheme
) -> Tensor:
    """Whether each code's value is the nearest to the quotient; either one where it is a tie.

    A tie is one up to what dividing in another order changes: multiplying with the reciprocal, or
    with two scales one after the other.
    """
    wide = torch.promote_types(w_RC.dtype, torch.float32)
    quotient_RC = _quotients(w_RC, held, scheme, wide)
    best_RC = out_of_tiles(_rounded(quotient_RC, scheme), tuple(w_RC.shape)).float()
    near_RC = value_RC == best_RC
    if not near_RC.all():
        # a quotient far out of range would make the slack wider than the range
        exact_RC = out_of_tiles(quotient_RC, tuple(w_RC.shape)).clamp(*_range(scheme))
        slack_RC = exact_RC.abs() * TIE
        tie_RC = (value_RC - exact_RC).abs() <= (best_RC - exact_RC).abs() + slack_RC
        near_RC |= tie_RC & exact_RC.isfinite()
    return near_RC


def weights(held: Mapping[str, Tensor], scheme: WeightScheme, columns: int) -> Tensor:
    """(code - zero point) * scale in float32: what the stored tensors stand for, [R, C]."""
    return scaled(values(held, scheme, columns), held, scheme)


def scaled(value_RC: Tensor, held: Mapping[str, Tensor], scheme: WeightScheme) -> Tensor:
    """The same of other codes, which are given up, under the stored scales and zero points."""
    x = in_tiles(value_RC, scheme)
    zero_point = zero_points(held, scheme, len(value_RC))
    if zero_point is not None:
        x = x.sub_(per_tile(zero_point.float(), x))
    x = x.mul_(per_tile(divisor(held, scheme).float(), x))
    return out_of_tiles(x, tuple(value_RC.shape))


def _range(scheme: WeightScheme) -> tuple[float, float]:
    """The least and the greatest value of a code."""
    if scheme.type == "int":
        least = -(2 ** (scheme.num_bits - 1))
        return least, -least - 1
    most = E4M3_MAX if scheme.num_bits == 8 else E2M1_MAX
    return -most, most


def _rounded(quotient: Tensor, scheme: WeightScheme) -> Tensor:
    if scheme.type == "int":
        return quotient.round().clamp(*_range(scheme))
    if scheme.num_bits == 8:
        return _looked_up(E4M3, quotient.clamp(*_range(scheme)).to(torch.float8_e4m3fn))
    return _to_e2m1(quotient)


def _to_e2m1(quotient: Tensor) -> Tensor:
    """To the nearest of the grid: as many steps up as there are midpoints below."""
    size = quotient.abs()
    index = torch.zeros_like(size, dtype=torch.int32)
    for middle, tie_goes_up in E2M1_MIDDLES:
        index += (size >= middle) if tie_goes_up else (size > middle)
    return _looked_up(E2M1, index.to(torch.uint8)) * quotient.sign().float()
