"""The numbers that headers cannot tell: scales, zero points, packed padding, NaN codes.

Reads every scale whole, and of the codes as much as the formats can hold a NaN in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.quantize.scheme import WeightScheme
from ckptq.spec import FLOATS
from ckptq.verify import nearest
from ckptq.verify.heads import E4M3_MAX
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding, ScaleRow
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

CACHE_RANGE = (1e-9, 1e6)
"""Where an activation's amax / 448 can lie: fp16 ends at 65504, norms keep values above 1e-6."""

WEIGHT_MOST = 1e6
"""No weight is that large; uninitialised memory often is."""

UNPROVED = "store dequantization multipliers; --source proves weights that really are so large"

SIGNED = 0.05
"""Share of negative scales that is a method; fewer are an accident."""

EMPTY = 1e-3
"""Of the median of the scales beside it: rows of a weight that are as good as zero."""

ZEROS = {"uint8": 0.0, "float8_e4m3fn": 0.125}
"""The scale that zeros are given, where it is not the eps of a float."""

LARGEST_WEIGHT = 3000.0
"""Of half of the rows: a single one may well be larger. Trained Linears stay below 10; those of the
examples, whose heads are spread on purpose, below 2500."""

GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")
GLOBAL_MOST = 1e30
"""NVFP4's global scales are divisors: 448 * 6 / amax."""

OUTLIER = 1e4
"""Times the median of the same scale in the other layers."""


def check_scale(
    tensor: StoredTensor,
    scale: Tensor,
    allowed: tuple[float, float] = (0.0, WEIGHT_MOST),
    too_large: str | None = None,
) -> Iterator[Finding]:
    """Finite, positive and within what such a number can be; the first element that is not.

    `too_large` is what mends one that is not within `allowed`, if calibration is not.
    """
    x = scale.reshape(-1).double()
    checks = (
        ("scale-not-finite", ~x.isfinite(), "finite scales"),
        ("scale-not-positive", x <= 0, "positive scales"),
        (
            "scale-uninitialised",
            x.isfinite() & (x > 0) & ((x < allowed[0]) | (x > allowed[1])),
            f"scales from {allowed[0]:g} to {allowed[1]:g}",
        ),
    )
    for code, bad, wanted in checks:
        if bad.any():
            index = int(bad.nonzero()[0])
            yield finding(
                code, tensor.name, file=tensor.file, wanted=wanted,
                found=f"{x[index].item():.4g} at element {index}, {int(bad.sum())} of "
                f"{x.numel()} are bad",
                repair=too_large if code == "scale-uninitialised" else None,
            )  # fmt: skip
            return


def cache_values(subject: Subject, files: Files) -> tuple[list[ScaleRow], list[Finding]]:
    """All q/k/v scales: their values, and what is wrong with them."""
    rows: list[ScaleRow] = []
    found: list[Finding] = []
    known: dict[str, dict[str, Tensor]] = {}
    for (module, which), tensor in subject.cache_scales.items():
        if tensor.spec.dtype not in FLOATS or tensor.spec.numel > 1 << 20 or not tensor.spec.numel:
            continue
        scale = read_tensor(tensor, files).reshape(-1)
        rows.append(ScaleRow(tensor=tensor.name, values=tuple(scale.tolist())))
        wrong = list(check_scale(tensor, scale, CACHE_RANGE))
        found += wrong
        if not wrong and module in subject.attention:
            known.setdefault(which, {})[tensor.name] = scale
    for scales in known.values():
        found += _placeholders(subject, scales)
        found += _outliers(subject, scales)
    found += _alike(subject, known)
    return rows, found


def _placeholders(subject: Subject, scales: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Exactly 1.0 for every head of a layer, or in every layer, is no calibrated scale."""
    ones = [name for name, scale in scales.items() if bool((scale == 1).all())]
    certain = len(ones) == len(scales) > 1 or any(scales[name].numel() > 1 for name in ones)
    for name in ones if certain or len(scales) == 1 else []:
        yield finding(
            "scales-all-one", name, file=subject.ckpt.tensors[name].file,
            found=f"1.0, in {len(ones)} of {len(scales)} layers", wanted="calibrated scales",
        )  # fmt: skip


def _alike(subject: Subject, known: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Finding]:
    """Scales per head that are one number in every layer: somebody spread a layer's scale."""
    scales = {name: scale for layers in known.values() for name, scale in layers.items()}
    several = {name: scale for name, scale in scales.items() if scale.numel() > 1}
    if len(several) > 2 and all(bool((s == s[0]).all()) for s in several.values()):
        name = next(iter(several))
        yield finding(
            "heads-alike", name, file=subject.ckpt.tensors[name].file,
            found=f"the same scale for all heads, in all {len(several)} tensors",
            wanted="scales of heads, or strategy tensor",
        )  # fmt: skip


def _outliers(subject: Subject, scales: Mapping[str, Tensor]) -> Iterator[Finding]:
    """A layer against the others; by its largest head, as heads may well differ by that much."""
    largest = {name: float(scale.max()) for name, scale in scales.items()}
    middle = median(largest.values())
    for name, value in largest.items():
        if value > middle * OUTLIER or value * OUTLIER < middle:
            yield finding(
                "scale-outlier", name, file=subject.ckpt.tensors[name].file,
                found=f"largest head {value:.4g}", wanted=f"near {middle:.4g}, the other layers'",
            )  # fmt: skip


def check_linear_values(linear: StoredLinear, files: Files) -> Iterator[Finding]:
    """Scales, zero points and shape of one Linear."""
    scale = linear.tensors["weight_scale"]
    held = read_tensor(scale, files)
    # where the round trip sees the weight itself, it may be as large as it is
    known = linear.module.origin is not None
    allowed = (0.0, inf if known else WEIGHT_MOST)
    if linear.scheme.scale_dtype == "uint8":
        yield from _mx(scale, held)
    else:
        wrong = _signed(linear, scale, held)
        wrong = wrong or list(check_scale(scale, held.float(), allowed, UNPROVED))
        yield from wrong or list(_all_ones(scale, held)) or _implausible(linear, scale, held)
    for local, tensor in linear.module.tensors.items():
        if local in (*GLOBAL_SCALES, "input_scale") and tensor.spec.dtype in FLOATS:
            most = GLOBAL_MOST if local in GLOBAL_SCALES else CACHE_RANGE[1]
            most = inf if known and local == "weight_global_scale" else most
            yield from check_scale(tensor, read_tensor(tensor, files), (0.0, most))
    if "weight_shape" in linear.tensors:
        yield from _shape_value(linear, files)


def _signed(linear: StoredLinear, tensor: StoredTensor, scale: Tensor) -> list[Finding]:
    """AutoRound turns the sign of a group so that its largest weight gets the code -8, which
    reaches farther than 7. Engines multiply, so that this is right; a lone sign is damage."""
    if linear.scheme.type != "int" or not linear.scheme.symmetric:
        return []
    share = float((scale < 0).float().mean())
    if share < SIGNED or list(check_scale(tensor, scale.float().abs())):
        return []
    found = f"{share:.0%} of the scales are negative"
    return [finding("scale-signed", tensor.name, file=tensor.file, found=found, wanted="any sign")]


def _all_ones(tensor: StoredTensor, scale: Tensor) -> Iterator[Finding]:
    if scale.numel() > 1 and bool((scale.float() == 1).all()):
        yield finding(
            "scales-all-one", tensor.name, file=tensor.file, found=f"1.0, {scale.numel()} times",
            wanted="the weight's scales",
        )  # fmt: skip


def _implausible(linear: StoredLinear, tensor: StoredTensor, scale: Tensor) -> Iterator[Finding]:
    """The middle scale says what the largest weight of a row or group is."""
    if linear.scheme.scale_dtype is not None or linear.module.origin is not None:
        return
    reach = E4M3_MAX if linear.scheme.type == "float" else 2.0 ** (linear.scheme.num_bits - 1)
    largest = reach * float(scale.float().abs().median())
    if largest > LARGEST_WEIGHT:
        yield finding(
            "scale-implausible", tensor.name, file=tensor.file,
            found=f"the largest weights of half the rows or groups would be beyond {largest:.3g}",
            wanted=f"at most {LARGEST_WEIGHT:g}", repair=UNPROVED,
        )  # fmt: skip


def _mx(tensor: StoredTensor, exponent: Tensor) -> Iterator[Finding]:
    if bool((exponent == 255).any()):
        yield finding(
            "scale-not-finite", tensor.name, file=tensor.file, found="an E8M0 of 255, which is NaN",
            wanted="0 to 254",
        )  # fmt: skip


def _shape_value(linear: StoredLinear, files: Files) -> Iterator[Finding]:
    tensor = linear.tensors["weight_shape"]
    said = read_tensor(tensor, files).tolist()
    if said != list(linear.shape):
        yield finding(
            "weight-shape-value", tensor.name, file=tensor.file, found=str(said),
            wanted=str(list(linear.shape)),
        )  # fmt: skip


def check_codes(linear: StoredLinear, held: Mapping[str, Tensor]) -> Iterator[Finding]:
    """NaN codes, and bits behind the last packed code, in some rows."""
    codes = linear.tensors[linear.scheme.codes]
    tensor = held[linear.scheme.codes]
    yield from _empty_rows(linear, held)
    if tensor.dtype == torch.float8_e4m3fn:
        nan = (tensor.view(torch.uint8) & 0x7F) == 0x7F
        if nan.any():
            yield finding(
                "codes-nan", codes.name, file=codes.file, found=f"{int(nan.sum())} NaN codes",
                wanted="none",
            )  # fmt: skip
    elif tensor.dtype == torch.int32 and _padding(tensor, linear.shape[1], linear.scheme.num_bits):
        yield finding(
            "padding", codes.name, file=codes.file, found="bits set behind the last column",
            wanted="zeros",
        )  # fmt: skip
    if "weight_zero_point" in held:
        yield from _zero_points(linear, held["weight_zero_point"], len(tensor))


def _empty_rows(linear: StoredLinear, held: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Rows of zero bytes under a scale that says that something was there: the largest weight of a
    row, group or block has one of the largest codes."""
    scheme, scale = linear.scheme, held["weight_scale"]
    if scheme.strategy == "tensor" or scale.ndim != 2:
        return
    codes = held[scheme.codes].contiguous()
    byte_RB = codes.flatten().view(torch.uint8).view(len(codes), -1)
    wide = torch.int64 if byte_RB.shape[1] % 8 == 0 else torch.uint8
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
        yield finding(
            "codes-empty", tensor.name, file=tensor.file,
            found=f"{count} of {len(codes)} rows in one place are zero bytes, and have scales",
            wanted="codes",
        )  # fmt: skip


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
            yield finding(
                "padding", tensor.name, file=tensor.file, found="bits set behind the last row",
                wanted="zeros",
            )  # fmt: skip
    elif bool(((zero_point < -half) | (zero_point >= half)).any()):
        found = f"{int(zero_point.min())} to {int(zero_point.max())}"
        yield finding(
            "zero-point-range", tensor.name, file=tensor.file, found=found,
            wanted=f"{-half} to {half - 1}",
        )  # fmt: skip


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
