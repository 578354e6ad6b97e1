"""One block of a weight: the source's rows against what is stored for them.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ckptq.checkpoint.read import bytes_of
from ckptq.quantize import scales
from ckptq.quantize.formats import needs_statistic, quantize, statistic, tile_amax
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.tiles import tiled
from ckptq.quantize.weight_scheme import FORMATS, WeightScheme
from ckptq.verify.roundtrip import nearest

SCRATCH = Scratch()
"""What quantizing a block needs, each thread its own; its codes are looked at before the next."""

MARGIN_DB = 2.0
FLOAT_DB = {"fp8": 31.5, "mxfp8": 31.5, "mxfp4": 19.0, "nvfp4": 20.4}
"""Gaussian weights, measured; hardly any dependence on the tile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Counts over some rows of one weight; adding them gives those of all its rows."""

    elements: int = 0
    unproved: int = 0
    """Blocks of rows that are not, byte for byte, what the converter would write."""
    wrong: int = 0
    """Codes that are not the nearest for the stored scale."""
    twice: int = 0
    """Of those, the ones that dividing in the weight's dtype explains."""
    foreign: int = 0
    """Codes that are neither for the scale which the plain minimum and maximum give."""
    scales: int = 0
    scales_wrong: int = 0
    """Scales, or zero points, that the plain minimum and maximum do not give."""
    zeros_wrong: int = 0
    """Of those, the ones of which only the zero point is another."""
    exact: int = 0
    """Elements that are the source's own number; counted for a quantized source."""
    signal: float = 0.0
    noise: float = 0.0
    rows_lost: int = 0
    """Rows with far more noise than signal: of another weight, or of the other sign."""
    low: float = 0.0
    high: float = 0.0
    """Extremes of the source, for scales of whole tensors."""
    observed: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    """Digests, run by run, of the scales that should be there and of those that are."""

    def __add__(self, other: Tally) -> Tally:
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Tally(**{**summed, "low": low, "high": high})

    @property
    def snr_db(self) -> float:
        return decibels(self.signal, self.noise)


def decibels(signal: float, noise: float) -> float:
    """Signal over noise energy in dB; inf without noise, -inf where a scale was not finite."""
    if noise == 0:
        return math.inf
    if not math.isfinite(noise) or signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)


def snr_db(found: Tensor, wanted: Tensor) -> float:
    """In decibels; -inf where something is not finite."""
    noise = (found - wanted).square_().sum(dtype=torch.float64).item()
    return decibels(wanted.square().sum(dtype=torch.float64).item(), noise)


def floor_db(scheme: WeightScheme, shape: tuple[int, int]) -> float:
    """What the format reaches on Gaussian weights, less a margin of 2 dB.

    Floats: measured. Integers: steps of amax / half_range have the noise step^2 / 12, and the
    largest of n Gaussian numbers is near sqrt(2 ln n) standard deviations.
    """
    if scheme.type == "float":
        return FLOAT_DB[f"{FORMATS[scheme.format].short}{scheme.num_bits}"] - MARGIN_DB
    R, C = shape
    tile = {"tensor": R * C, "channel": C}.get(scheme.strategy, scheme.group_size or C)
    crest = math.sqrt(2 * math.log(max(tile, 8)))
    return 20 * math.log10(scheme.half_range * math.sqrt(12) / crest) - MARGIN_DB


def compare(
    w_RC: Tensor, held: Mapping[str, Tensor], scheme: WeightScheme, *, alike: bool = False
) -> Tally:
    """Everything countable about these rows. Raises `NonFinite` where the source is NaN or Inf.

    `alike` says that the source is quantized too, so that its numbers may be the same.
    """
    made = observe(w_RC, held, scheme)
    dequantized = nearest.weights(held, scheme, w_RC.shape[1])
    exact = int(same_numbers(dequantized, w_RC, scheme).count_nonzero()) if alike else 0
    wide_RC = w_RC.float()
    noise_R, signal_R = _energies(dequantized.sub_(wide_RC)), _energies(wide_RC)
    noise, signal = noise_R.sum().item(), signal_R.sum().item()
    if exact == w_RC.numel():
        noise = 0.0  # but for the rounding of the source's numbers to their dtype
    other_scale = _scales_differ(made, held, scheme)
    differ = other_scale | _zeros_differ(made, held, scheme, w_RC.shape[0])
    wrong = twice = foreign = 0
    same = scheme.codes in made and same_bytes(made[scheme.codes], held[scheme.codes])
    if not same:
        wrong, twice, foreign = _codes(w_RC, held, made, scheme)
    elif differ.any():
        wrong, twice, _ = _codes(w_RC, held, made, scheme)
    low, high = statistic(w_RC, scheme).tolist() if needs_statistic(scheme) else (0.0, 0.0)
    return Tally(
        elements=w_RC.numel(),
        unproved=0 if same and not differ.any() else 1,
        wrong=wrong,
        twice=twice,
        foreign=foreign,
        scales=differ.numel(),
        scales_wrong=int(differ.count_nonzero()),
        zeros_wrong=int((differ & ~other_scale).count_nonzero()),
        exact=exact,
        signal=signal,
        noise=noise,
        rows_lost=int((noise_R > LOST * signal_R).count_nonzero()),
        low=low,
        high=high,
        observed=(digest(made["weight_scale"]),) if "weight_scale" in made else (),
        held=(digest(held["weight_scale"]),),
    )


def _energies(x_RC: Tensor) -> Tensor:
    """[R]: each row's sum of squares; float32 is enough for a row, these are added in float64."""
    return torch.linalg.vecdot(x_RC, x_RC).double()


LOST = 10**0.2
"""Noise over signal of a row that is lost, 2 dB: another weight in its place has 3, its own with
the other sign 6. Codes that GPTQ chose may lose a column, but no row."""

INVERTED = 2.0**-22
"""How far a global scale may be from the inverse of ModelOpt's: both are float32."""


def same_numbers(found: Tensor, w_RC: Tensor, scheme: WeightScheme) -> Tensor:
    """Element by element, whether `found` in float32 is the number of the source, in its dtype."""
    same = found.to(w_RC.dtype) == w_RC
    if scheme.strategy != "tensor_group" or same.all():
        return same
    for slack in (1 - INVERTED, 1 + INVERTED):
        same |= (found * slack).to(w_RC.dtype) == w_RC
    return same


def observe(w_RC: Tensor, held: Mapping[str, Tensor], scheme: WeightScheme) -> dict[str, Tensor]:
    """What these rows alone determine: nothing more than codes under one scale for the tensor."""
    if scheme.strategy == "tensor":
        return {}
    if scheme.strategy == "tensor_group":
        amax = tile_amax(tiled(w_RC.contiguous(), scheme), scheme, SCRATCH)
        return {"weight_scale": scales.nvfp4(amax, held["weight_global_scale"])}
    return quantize(w_RC, scheme, scratch=SCRATCH)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors of the same size hold the same; torch compares elements one by
    one, and so as wide ones as there are."""
    flat_a, flat_b = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    wide = torch.int64 if flat_a.numel() % 8 == 0 and _aligned(flat_a, flat_b) else torch.uint8
    return torch.equal(flat_a.view(wide), flat_b.view(wide))


def _aligned(*flat: Tensor) -> bool:
    """Whether they may be viewed as 8-byte elements."""
    return all(x.storage_offset() % 8 == 0 for x in flat)


def digest(tensor: Tensor) -> str:
    return hashlib.blake2b(bytes_of(tensor.contiguous()), digest_size=16).hexdigest()


def _scales_differ(
    made: Mapping[str, Tensor], held: Mapping[str, Tensor], scheme: WeightScheme
) -> Tensor:
    """Of each tile, whether its scale is another than observed."""
    if "weight_scale" not in made:
        return torch.zeros(0, dtype=torch.bool)
    wanted, found = made["weight_scale"], held["weight_scale"]
    if scheme.scale_dtype is None and found.dtype != wanted.dtype:
        wanted, found = _in_the_coarser(wanted, found)
    return wanted != found if scheme.scale_dtype == "uint8" else wanted.float() != found.float()


def _zeros_differ(
    made: Mapping[str, Tensor], held: Mapping[str, Tensor], scheme: WeightScheme, rows: int
) -> Tensor:
    """Of each tile, whether its zero point is another than observed."""
    if scheme.symmetric or "weight_scale" not in made:
        return torch.zeros((), dtype=torch.bool)
    ours, theirs = (nearest.zero_points(t, scheme, rows) for t in (made, held))
    assert ours is not None
    assert theirs is not None
    return ours != theirs


def _in_the_coarser(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales may be stored in another dtype than the weight's: compare what both can hold."""
    coarser = a.dtype if torch.finfo(a.dtype).eps > torch.finfo(b.dtype).eps else b.dtype
    return a.to(coarser), b.to(coarser)


def _codes(
    w_RC: Tensor, held: Mapping[str, Tensor], made: Mapping[str, Tensor], scheme: WeightScheme
) -> tuple[int, int, int]:
    """(not nearest, of them rounded twice, neither for the observed scale)."""
    wide = torch.promote_types(w_RC.dtype, torch.float32)
    code_RC = nearest.values(held, scheme, w_RC.shape[1])
    wrong_RC = ~nearest.as_near(code_RC, w_RC, held, scheme)
    twice = 0
    if wrong_RC.any() and w_RC.dtype != wide:
        again_RC = nearest.recode(w_RC, held, scheme, w_RC.dtype)
        twice = int((wrong_RC & (code_RC == again_RC)).count_nonzero())
    foreign = int(wrong_RC.count_nonzero()) - twice
    if made:
        theirs = {**held, **made}
        foreign_RC = ~nearest.as_near(code_RC, w_RC, theirs, scheme)
        if foreign_RC.any() and w_RC.dtype != wide:
            foreign_RC &= code_RC != nearest.recode(w_RC, theirs, scheme, w_RC.dtype)
        foreign = int(foreign_RC.count_nonzero())
    return int(wrong_RC.count_nonzero()), twice, foreign
