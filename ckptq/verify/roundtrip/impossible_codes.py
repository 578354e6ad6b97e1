"""Impossible codes and zero points: NaN, out of range, padding bits, rows of zero bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.roundtrip import nearest
from ckptq.verify.stored_linear import StoredLinear

if TYPE_CHECKING:
    from torch import Tensor

EMPTY = 1e-3
"""Of the median of the scales beside it: rows of a weight that are as good as zero."""

ZEROS = {"uint8": 0.0, "float8_e4m3fn": 0.125}
"""The scale that zeros are given, where it is not the eps of a float."""


def check_codes(linear: StoredLinear, held: Mapping[str, Tensor]) -> Iterator[Finding]:
    """NaN codes, and bits behind the last packed code, in some rows."""
    codes = linear.tensors[linear.scheme.codes]
    tensor = held[linear.scheme.codes]
    yield from _empty_rows(linear, held)
    yield from _range(linear, tensor)
    if tensor.dtype == torch.float8_e4m3fn:
        unsigned = tensor.view(torch.uint8) & 0x7F
        if unsigned.amax() == 0x7F:
            found = f"{int((unsigned == 0x7F).count_nonzero())} NaN codes"
            yield finding("codes-nan", codes, found=found, wanted="none")
    elif tensor.dtype == torch.int32 and _padding(tensor, linear.shape[1], linear.scheme.num_bits):
        yield finding("padding", codes, found="bits set after the last column", wanted="zeros")
    if "weight_zero_point" in held:
        yield from _zero_points(linear, held["weight_zero_point"], len(tensor))


def _range(linear: StoredLinear, codes: Tensor) -> Iterator[Finding]:
    """Codes of fewer than 8 bits in bytes; packed codes cannot be out of range."""
    half = 2 ** (linear.scheme.num_bits - 1)
    if codes.dtype != torch.int8 or linear.scheme.num_bits >= 8:
        return
    low, high = int(codes.min()), int(codes.max())
    if low < -half or high >= half:
        tensor = linear.tensors[linear.scheme.codes]
        wanted = f"{-half} to {half - 1}, which {linear.scheme.num_bits} bits hold"
        yield finding("codes-range", tensor, found=f"codes from {low} to {high}", wanted=wanted)


def _empty_rows(linear: StoredLinear, held: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Rows of zero bytes with a nonzero scale: impossible, since the largest weight of a row, group
    or block has one of the largest codes."""
    scheme, scale = linear.scheme, held["weight_scale"]
    if scheme.strategy == "tensor" or scale.ndim != 2:
        return
    codes = held[scheme.codes].contiguous()
    byte_RB = codes.flatten().view(torch.uint8).view(len(codes), -1)
    wide = torch.int64 if byte_RB.shape[1] % 8 == 0 else torch.uint8
    empty_R = byte_RB.view(wide)[:, 0] == 0
    if not empty_R.any():  # as almost always, and all that is read then
        return
    empty_R = (byte_RB.view(wide) == 0).all(1)
    if not empty_R.any():
        return
    meant_R = _meant(scale, scheme, nearest.divisor(held, scheme))
    if scheme.block_structure is not None:
        height = scheme.block_structure[0]
        blocks_MH = pad(empty_R, (0, -len(codes) % height), value=True).view(-1, height)
        whole_M = blocks_MH.all(1) & meant_R
        empty_R &= whole_M.repeat_interleave(height)[: len(codes)]
    else:
        empty_R &= meant_R
    if not scheme.symmetric:
        empty_R &= ~_all_least(linear, held)
    if count := int(empty_R.sum()):
        tensor = linear.tensors[scheme.codes]
        found = f"{count} of {len(codes)} rows in one place are zero bytes with nonzero scales"
        yield finding("codes-empty", tensor, found=found, wanted="codes")


def _meant(scale: Tensor, scheme: WeightScheme, size: Tensor) -> Tensor:
    """Of each row of scales, whether its largest is neither that of zeros nor next to nothing."""
    of_zeros = ZEROS.get(scheme.scale_dtype or "")
    if of_zeros is None:
        of_zeros = torch.finfo(scale.dtype).eps
    largest = size.float().amax(1)
    return (largest > EMPTY * largest.median()) & (scale.float().amax(1) != of_zeros)


def _all_least(linear: StoredLinear, held: Mapping[str, Tensor]) -> Tensor:
    """Rows [R] whose groups all have the largest zero point: they hold no positive weight, and if
    the weights of each group are equal, all have the least code, which is stored as zeros."""
    zero_point = nearest.zero_points(held, linear.scheme, len(held[linear.scheme.codes]))
    assert zero_point is not None
    return (zero_point == 2 ** (linear.scheme.num_bits - 1) - 1).all(1)


def _zero_points(linear: StoredLinear, zero_point: Tensor, rows: int) -> Iterator[Finding]:
    tensor, bits = linear.tensors["weight_zero_point"], linear.scheme.num_bits
    half = 2 ** (bits - 1)
    if linear.scheme.format == "pack-quantized":
        if _padding(zero_point.t().contiguous(), rows, bits):
            yield finding("padding", tensor, found="bits set after the last row", wanted="zeros")
    elif bool(((zero_point < -half) | (zero_point >= half)).any()):
        found = f"{int(zero_point.min())} to {int(zero_point.max())}"
        yield finding("zero-point-range", tensor, found=found, wanted=f"{-half} to {half - 1}")


def _padding(word_RW: Tensor, columns: int, num_bits: int) -> bool:
    """Whether the words hold anything behind their `columns` codes."""
    used = columns * num_bits
    spare = word_RW.shape[1] * 32 - used
    if spare == 0:
        return False
    if spare >= 32:
        return bool((word_RW[:, -(spare // 32) :] != 0).any())
    last = word_RW[:, -1].long() & 0xFFFFFFFF
    return bool((last >> (32 - spare)).any())
