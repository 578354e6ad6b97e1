"""Ways in which a weight can be wrong, each as a change that would repair it.

A hypothesis is confirmed if undoing the change gives the source's weight.
Shape letters: R rows, C columns, G groups, W words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Effect, Move, Part, Projection, effect_on
from ckptq.rope_order import Heads, RopeOrder
from ckptq.spec import spec_of
from ckptq.verify.diagnosis.sample import Sample
from ckptq.verify.roundtrip import nearest
from ckptq.verify.roundtrip.tally import snr_db
from ckptq.verify.stored_linear import Held

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of the code that AutoAWQ packs at each place of a word."""
AWQ_BACK = tuple(AWQ.index(place) for place in range(8))


@dataclass(frozen=True, kw_only=True, slots=True)
class Hypothesis:
    """What may have happened, and what would be stored if it had not."""

    code: str
    found: str
    repair: str | None
    held: Held


def hypotheses(
    sample: Sample, heads: Heads | None, order: RopeOrder, scales_only: bool, undone: bool
) -> Iterator[Hypothesis]:
    """All hypotheses about a single weight; with `scales_only`, its codes are right.

    `heads` is given for q_proj and k_proj; `order` is their source's. `undone` means that they are
    marked with the other order and have been moved back in the sample.
    """
    yield from _scales(sample)
    if heads is not None:
        yield from _rope(sample, heads, order, scales_only, undone)
    yield from _zero_points(sample)
    if not scales_only:
        yield from _codes(sample)


def _scales(sample: Sample) -> Iterator[Hypothesis]:
    scale, scheme = sample.held["weight_scale"], sample.linear.scheme
    if scheme.scale_dtype == "uint8":
        yield _changed(sample, "scale-inverted", "2^(127 - e)", weight_scale=254 - scale)
    elif scheme.scale_dtype is None:
        yield _changed(sample, "scale-inverted", "reciprocals", weight_scale=1 / scale.float())
    else:
        whole = sample.held["weight_global_scale"]
        found = "the global scale is a reciprocal"
        yield _changed(sample, "scale-inverted", found, weight_global_scale=1 / whole)
    yield from _one_factor(sample)
    if scale.ndim != 2 or scale.numel() == 1:
        return
    for dim, what in ((0, "row"), (1, "group")):
        for step in (1, -1):
            if scale.shape[dim] > 1:
                found = f"each scale is one {what} {'late' if step < 0 else 'early'}"
                yield _changed(sample, "scale-shifted", found, weight_scale=scale.roll(step, dim))
    if scale.shape[0] == scale.shape[1]:
        yield _changed(sample, "scale-transposed", "the grid is transposed", weight_scale=scale.t())


def _one_factor(sample: Sample) -> Iterator[Hypothesis]:
    """All scales off by one factor, such as E4M3's other range or shifted exponents."""
    found, wanted = sample.weights(), sample.w_RK
    factor = float((found * wanted).sum() / found.square().sum())
    scale, scheme = sample.held["weight_scale"], sample.linear.scheme
    whole = sample.held.get("weight_global_scale")
    lone = scale if whole is None else 1 / whole
    if not 0 < factor < torch.inf or _is_reciprocal(lone, factor):
        return
    if scheme.scale_dtype == "uint8":
        steps = round(math.log2(factor))
        said = f"every exponent is {abs(steps)} too {'low' if steps > 0 else 'high'}"
        moved = (scale.int() + steps).clamp(0, 254).to(scale.dtype)
        yield _changed(sample, "scale-wrong", said, f"add {steps} to it", weight_scale=moved)
        return
    times = f"{1 / factor:.{3 if scheme.num_bits == 8 else 2}g}"
    said, repair = f"every scale is {times} times the codes'", f"divide the scales by {times}"
    if whole is None:
        yield _changed(sample, "scale-wrong", said, repair, weight_scale=scale.float() * factor)
    else:
        repair = f"multiply the global scale by {times}"
        yield _changed(sample, "scale-wrong", said, repair, weight_global_scale=whole / factor)


def _is_reciprocal(scale: Tensor, factor: float) -> bool:
    """A single number fits both explanations; a reciprocal is more likely."""
    return scale.numel() == 1 and abs(factor * float(scale) ** 2 - 1) < 0.05


def _changed(
    sample: Sample, code: str, found: str, repair: str | None = None, **tensors: Tensor
) -> Hypothesis:
    """That these tensors were stored otherwise."""
    held = sample.with_tensors(**tensors)
    return Hypothesis(code=code, found=found, repair=repair, held=held)


def _rope(
    sample: Sample, heads: Heads, order: RopeOrder, scales_only: bool, undone: bool
) -> Iterator[Hypothesis]:
    """Some parts are in the other order: any parts, moved back; or none is, against the mark."""
    if heads.rows != sample.linear.shape[0] or sample.linear.scheme.block_structure:
        return
    projection = Projection(sample.linear.name, heads, bits=sample.linear.scheme.num_bits)
    effects = {k: effect_on(k, spec_of(t), projection) for k, t in sample.held.items()}
    moved = {k: e for k, e in effects.items() if e.move is not Move.KEPT}
    parts = sorted({effect.part for effect in moved.values()})
    allowed = [part for part in parts if not (scales_only and part is Part.WEIGHTS)]
    for count in range(1, len(allowed) + 1):
        for chosen in combinations(allowed, count):
            yield _moved_back(sample, moved, chosen, order, whole=len(chosen) == len(parts))
    if undone and not scales_only:
        yield _never_moved(sample, moved, order)


def _never_moved(sample: Sample, moved: dict[str, Effect], order: RopeOrder) -> Hypothesis:
    stored = {
        local: permute_tensor(sample.held[local].contiguous(), effect, order.other)
        for local, effect in moved.items()
    }
    return Hypothesis(
        code="rows-permuted",
        found=f"marked as {order.other}, but in {order} order",
        repair="remove the mark ckptq.rope_order from config.json and from every shard's metadata",
        held={**sample.held, **stored},
    )


def _moved_back(
    sample: Sample,
    moved: dict[str, Effect],
    chosen: tuple[Part, ...],
    order: RopeOrder,
    whole: bool,
) -> Hypothesis:
    back = {
        local: permute_tensor(sample.held[local].contiguous(), effect, order)
        for local, effect in moved.items()
        if effect.part in chosen
    }
    code = "zero-points-permuted"
    for part, name in ((Part.SCALES, "scale-permuted"), (Part.WEIGHTS, "codes-permuted")):
        code = name if part in chosen else code
    only = "" if whole else "".join(f" --only {part}" for part in chosen)
    these = "weights and scales" if whole else " and ".join(chosen)
    return Hypothesis(
        code="rows-permuted" if whole else code,
        found=f"{these} in {order.other} order, " + ("" if whole else f"the rest in {order}"),
        repair=f"`ckptq permute CKPT OUT --to {order}{only}`",
        held={**sample.held, **back},
    )


def _codes(sample: Sample) -> Iterator[Hypothesis]:
    packed, scheme = sample.held.get("weight_packed"), sample.linear.scheme
    whole = sample.held.get("weight")
    if whole is not None and whole.dtype == torch.int8:
        shifted = (whole.view(torch.uint8) ^ 0x80).view(torch.int8)
        yield _of_codes(sample, "codes-offset", "unsigned codes, 128 more", shifted)
    if packed is None:
        return
    if packed.dtype == torch.int32:
        yield from _bytes(sample, packed)
    if scheme.num_bits == 4:
        yield from _nibbles(sample, packed)


def _bytes(sample: Sample, packed: Tensor) -> Iterator[Hypothesis]:
    """Words of the other byte order, of halves exchanged, and 8-bit codes without their offset."""
    byte_RWB = packed.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    for found, order in (
        ("the bytes of each word are reversed", [3, 2, 1, 0]),
        ("the halves of each word are exchanged", [2, 3, 0, 1]),
        ("the bytes of each half word are exchanged", [1, 0, 3, 2]),
    ):
        turned = byte_RWB[..., order].flatten(1).contiguous().view(torch.int32)
        yield _of_codes(sample, "bytes-swapped", found, turned)
    if sample.linear.scheme.num_bits == 8:
        signed = (byte_RWB ^ 0x80).flatten(1).contiguous().view(torch.int32)
        yield _of_codes(sample, "codes-offset", "signed codes, without the offset of 128", signed)


def _nibbles(sample: Sample, packed: Tensor) -> Iterator[Hypothesis]:
    as_bytes = packed.contiguous().view(torch.uint8)
    swapped = ((as_bytes & 15) << 4 | as_bytes >> 4).view(packed.dtype)
    yield _of_codes(sample, "nibbles-swapped", "the high half of each byte first", swapped)
    if packed.dtype != torch.int32:
        return
    turned = swapped.contiguous().view(torch.uint8).unflatten(1, (-1, 4)).flip(2).flatten(1)
    backwards = turned.contiguous().view(torch.int32)
    yield _of_codes(sample, "nibbles-swapped", "the last code in the lowest bits", backwards)
    for found, order in (("AutoAWQ's order", AWQ), ("the inverse of AutoAWQ's order", AWQ_BACK)):
        yield _of_codes(sample, "nibbles-swapped", found, _reordered(packed, order))
    signed = (as_bytes ^ 0x88).view(packed.dtype)
    yield _of_codes(sample, "codes-offset", "signed codes, without the offset of 8", signed)


def _reordered(packed: Tensor, order: tuple[int, ...]) -> Tensor:
    """Words whose code at place order[i] is the one that stood at i."""
    made = torch.zeros_like(packed)
    for place, goes in enumerate(order):
        made |= (packed >> 4 * place & 15) << 4 * goes
    return made


def _of_codes(sample: Sample, code: str, found: str, codes: Tensor) -> Hypothesis:
    return _changed(sample, code, found, None, **{sample.linear.scheme.codes: codes})


def _zero_points(sample: Sample) -> Iterator[Hypothesis]:
    """Other tools' conventions: without the offset, less one (GPTQ's first format), none at all."""
    zero_point = sample.held.get("weight_zero_point")
    if zero_point is None or sample.linear.scheme.num_bits != 4 or zero_point.dtype != torch.int32:
        return
    nibbles = zero_point.contiguous().view(torch.uint8)
    low, high = nibbles & 15, nibbles >> 4
    changes = (
        ("signed zero points, without the offset of 8", nibbles ^ 0x88),
        ("zero points are one too low, as in GPTQ's first format", _joined(low + 1, high + 1)),
        ("zero points are one too high", _joined(low - 1, high - 1)),
        ("zero points are packed the high half first", _joined(high, low)),
    )
    for found, changed in changes:
        zeros = changed.view(torch.int32)
        yield _changed(sample, "zero-points-offset", found, weight_zero_point=zeros)


def _joined(low: Tensor, high: Tensor) -> Tensor:
    return (low & 15) | (high & 15) << 4


def rescaled_columns(sample: Sample) -> tuple[float, float, float]:
    """SNR in dB once every column may be stretched, as AWQ and SmoothQuant do, that of the nearest
    codes for such columns, and with one factor for all."""
    found, wanted = sample.weights(), sample.w_RK
    dot_K, square_K = (found * wanted).sum(0), wanted.square().sum(0)
    stretched = wanted * (dot_K / square_K.clamp(min=1e-30))
    factor = dot_K.sum() / square_K.sum().clamp(min=1e-30)
    scheme = sample.linear.scheme
    code_RK = nearest.recode(stretched, sample.held, scheme, torch.float32)
    best = nearest.scaled(code_RK, sample.held, scheme)
    return snr_db(found, stretched), snr_db(best, stretched), snr_db(found, wanted * factor)
