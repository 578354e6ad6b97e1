"""Checks of values: q/k/v scales, weight scales, weight_shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from statistics import median
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.quantize.scales import E4M3_MAX
from ckptq.spec import FLOATS
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

UNPROVED = "store dequantization multipliers; --source proves weights that are really so large"

SIGNED = 0.05
"""Share of negative scales that is a method; fewer are an accident."""

LARGEST_WEIGHT = 3000.0
"""Of half of the rows: a single one may well be larger. Trained Linears stay below 10; those of the
examples, whose heads are spread on purpose, below 2500."""

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
            share = f"{int(bad.sum())} of {x.numel()} are bad"
            found = f"{x[index].item():.4g} at element {index}, {share}"
            repair = too_large if code == "scale-uninitialised" else None
            yield finding(code, tensor, found=found, wanted=wanted, repair=repair)
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
        found = f"1.0, in {len(ones)} of {len(scales)} layers"
        wanted = "calibrated scales"
        yield finding("scales-all-one", subject.ckpt.tensors[name], found=found, wanted=wanted)


def _alike(subject: Subject, known: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Finding]:
    """Per-head scales that are equal within every layer: a per-layer scale was expanded."""
    scales = {name: scale for layers in known.values() for name, scale in layers.items()}
    several = {name: scale for name, scale in scales.items() if scale.numel() > 1}
    if len(several) > 2 and all(bool((s == s[0]).all()) for s in several.values()):
        name = next(iter(several))
        found = f"the same scale for all heads, in all {len(several)} tensors"
        wanted = "a scale per head, or strategy tensor"
        yield finding("heads-alike", subject.ckpt.tensors[name], found=found, wanted=wanted)


def _outliers(subject: Subject, scales: Mapping[str, Tensor]) -> Iterator[Finding]:
    """A layer against the others; by its largest head, as heads may well differ by that much."""
    largest = {name: float(scale.max()) for name, scale in scales.items()}
    middle = median(largest.values())
    for name, value in largest.items():
        if value > middle * OUTLIER or value * OUTLIER < middle:
            found = f"largest head {value:.4g}"
            wanted = f"near {middle:.4g}, as in other layers"
            yield finding("scale-outlier", subject.ckpt.tensors[name], found=found, wanted=wanted)


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
    whole = linear.module.tensors.get("weight_global_scale")
    if whole is not None and whole.spec.dtype in FLOATS:
        most = inf if known else GLOBAL_MOST
        yield from check_scale(whole, read_tensor(whole, files), (0.0, most))
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
    return [finding("scale-signed", tensor, found=found, wanted="any sign")]


def _all_ones(tensor: StoredTensor, scale: Tensor) -> Iterator[Finding]:
    if scale.numel() > 1 and bool((scale.float() == 1).all()):
        found = f"1.0, {scale.numel()} times"
        yield finding("scales-all-one", tensor, found=found, wanted="the weight's scales")


def _implausible(linear: StoredLinear, tensor: StoredTensor, scale: Tensor) -> Iterator[Finding]:
    """The middle scale says what the largest weight of a row or group is."""
    if linear.scheme.scale_dtype is not None or linear.module.origin is not None:
        return
    reach = E4M3_MAX if linear.scheme.type == "float" else 2.0 ** (linear.scheme.num_bits - 1)
    largest = reach * float(scale.float().abs().median())
    if largest > LARGEST_WEIGHT:
        found = f"half of the rows or groups would have weights beyond {largest:.3g}"
        wanted = f"at most {LARGEST_WEIGHT:g}"
        yield finding("scale-implausible", tensor, found=found, wanted=wanted, repair=UNPROVED)


def _mx(tensor: StoredTensor, exponent: Tensor) -> Iterator[Finding]:
    if bool((exponent == 255).any()):
        found = "the E8M0 code 255, which is NaN"
        yield finding("scale-not-finite", tensor, found=found, wanted="0 to 254")


def _shape_value(linear: StoredLinear, files: Files) -> Iterator[Finding]:
    tensor = linear.tensors["weight_shape"]
    said = read_tensor(tensor, files).tolist()
    if said != list(linear.shape):
        yield finding("weight-shape-value", tensor, found=str(said), wanted=str(list(linear.shape)))
