"""Samples of every kind of weight, decoded by ckptq and by the libraries that define the formats.

The writer and the verifier share ckptq's reading of a format, so that both could be wrong and
agree. Therefore the first, the last and one other weight of each kind are decoded by
compressed-tensors (its own formats) and transformers (sources of other tools), which must agree
with ckptq on the stored weight, the source, and their distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ckptq.checkpoint.open import CONFIG
from ckptq.checkpoint.read import Files
from ckptq.models.encoded import Encoded
from ckptq.models.weight_rows import weight_rows
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import torch_dtype
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.roundtrip import nearest
from ckptq.verify.roundtrip.decoders.libraries import (
    ct_scheme,
    decode_compressed,
    decode_source,
    source_library,
)
from ckptq.verify.roundtrip.decoders.makers import decodes_experts, first_expert
from ckptq.verify.roundtrip.tally import same_numbers, snr_db
from ckptq.verify.roundtrip.undo import Undo
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.subject import EXPERT, Subject

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

ELEMENTS = 1 << 20
"""Of a sample, about."""

RELATIVE = 2.0**-6
"""What rounding to bf16 twice may change."""

ABSOLUTE = 2.0**-16
"""Of the largest: where products leave the range of float16."""

CLOSE_DB = 3.0
EXACT_DB = 60.0
"""From here on only rounding is left."""


def check_decoders(
    subject: Subject, linears: Mapping[str, StoredLinear], files: Files, undo: Undo
) -> Iterator[Finding]:
    """A finding for each sample that the libraries decode differently, and for each config group
    that compressed-tensors refuses."""
    schemes: dict[str, QuantizationScheme | None] = {}
    for linear, start, stop in samples(linears):
        group = linear.module.group
        assert group is not None
        if group.name not in schemes:
            schemes[group.name], refused = _scheme(subject, group.name)
            yield from refused
        if (scheme := schemes[group.name]) is not None:
            yield from _compared(subject, linear, scheme, files, undo, start, stop)


def check_fused(subject: Subject, files: Files) -> Iterator[Finding]:
    """As `check_decoders`, for the first and last of the experts that a source holds in tensors of
    codes for all."""
    fused = list(subject.decoded.values())
    for weight in {id(one): one for one in (*fused[:1], *fused[-1:])}.values():
        ours = weight_rows(files, weight)(0, weight.quantum).float()
        theirs = _or_error(partial(first_expert, weight.tensors))
        who = decodes_experts(weight.tensors)
        yield from _differ(weight.stored.name, "the source", who, ours, theirs)


def _scheme(subject: Subject, group: str) -> tuple[QuantizationScheme | None, list[Finding]]:
    try:
        return ct_scheme(subject.ckpt, group), []
    except MemoryError:
        raise
    except Exception as error:  # pydantic's, and whatever validators of compressed-tensors raise
        said = " ".join(str(error).split())[:200]
        where, wanted = f"config_groups.{group}", "a scheme that compressed-tensors accepts"
        return None, [finding("group-invalid", where, file=CONFIG, found=said, wanted=wanted)]


def samples(linears: Mapping[str, StoredLinear]) -> list[tuple[StoredLinear, int, int]]:
    """(Linear, first row, last row): of each kind the first, the last, and one at random, which is
    the same one each time."""
    kinds: dict[object, list[StoredLinear]] = {}
    for linear in linears.values():
        kinds.setdefault(kind_of(linear), []).append(linear)
    random = Random(len(linears))
    chosen = []
    for alike in kinds.values():
        for linear, which in ((alike[0], 0), (alike[-1], -1), (random.choice(alike), None)):
            runs = _runs(linear)
            start, stop = random.choice(runs) if which is None else runs[which]
            chosen.append((linear, start, stop))
    return list({(c[0].name, c[1]): c for c in chosen}.values())


def kind_of(linear: StoredLinear) -> object:
    """What tells apart how weights are decoded: the scheme and the dtypes of what is stored, and
    the same of the source; experts, which may be cut out of a fused tensor, on their own."""
    stored = tuple((local, tensor.spec.dtype) for local, tensor in sorted(linear.tensors.items()))
    origin = linear.module.origin
    source: object = None
    if origin is not None and isinstance(origin.weight, Encoded):
        held = sorted(origin.weight.tensors.items())
        source = (str(origin.weight.scheme), tuple((n, t.spec.dtype) for n, t in held))
    elif origin is not None:
        view = origin.weight
        source = (view.spec.dtype, view.index is None, view.streams)
    return str(linear.scheme), stored, source, EXPERT.match(linear.name) is not None


def _runs(linear: StoredLinear) -> list[tuple[int, int]]:
    """Spans of rows that begin where both the stored codes and the source's may be cut."""
    R, C = linear.shape
    weight = linear.module.origin.weight if linear.module.origin is not None else None
    block = weight.scheme.block_structure if isinstance(weight, Encoded) else None
    step = 32 * linear.quantum * (block[0] if block else 1)
    step *= max(ELEMENTS // (C * step), 1)
    return [(start, min(start + step, R)) for start in range(0, R, step)]


def _compared(
    subject: Subject,
    linear: StoredLinear,
    scheme: QuantizationScheme,
    files: Files,
    undo: Undo,
    start: int,
    stop: int,
) -> Iterator[Finding]:
    name = linear.name
    held = linear.read(files, start, stop)
    ours = nearest.weights(held, linear.scheme, linear.shape[1])
    theirs = _or_error(lambda: decode_compressed(linear.tensors, scheme, linear.shape, start, stop))
    yield from _differ(name, "the stored weight", "compressed-tensors", ours, theirs)
    origin = linear.module.origin
    if origin is None or subject.source is None:
        return
    source, weight = subject.source, origin.weight
    ours_there = weight_rows(files, weight)(start, stop).float()
    theirs_there = _or_error(lambda: decode_source(source, weight, start, stop))
    library = source_library(source)
    yield from _differ(weight.stored.name, "the source", library, ours_there, theirs_there)
    both = isinstance(theirs, Tensor) and isinstance(theirs_there, Tensor)
    if both and not undo.module(name, linear.tensors):
        assert isinstance(theirs, Tensor)
        assert isinstance(theirs_there, Tensor)
        yield from _apart(name, snr_db(ours, ours_there), snr_db(theirs, theirs_there))
        dtype = torch_dtype(weight.spec.dtype)
        if same_numbers(ours, ours_there.to(dtype), linear.scheme).all():
            yield from _not_exact(name, linear.scheme, theirs, theirs_there.to(dtype))


def _or_error(decode: Callable[[], Tensor | None]) -> Tensor | Exception | None:
    """A library's result, or its error, of whatever kind."""
    try:
        return decode()
    except MemoryError:
        raise
    except Exception as error:
        return error


def _differ(
    name: str, what: str, library: str, ours: Tensor, theirs: Tensor | Exception | None
) -> Iterator[Finding]:
    if theirs is None:
        return
    if isinstance(theirs, Exception):
        said = f"{type(theirs).__name__}: {str(theirs)[:200]}"
    elif theirs.shape != ours.shape:
        said = f"{list(theirs.shape)} instead of {list(ours.shape)}"
    else:
        apart = int((~_equal(ours, theirs)).sum())
        said = f"{apart:,} of {ours.numel():,} elements, {snr_db(ours, theirs):.1f} dB"
        if apart == 0:
            return
    found = f"{library} decodes {what} differently: {said}"
    yield finding("decoder-disagrees", name, found=found, wanted="the same weight from both")


def _equal(ours: Tensor, theirs: Tensor) -> Tensor:
    """Element by element, up to rounding; what is not finite is so in both."""
    finite = ours.isfinite() & theirs.isfinite()
    reach = ours[finite].abs().max() if finite.any() else torch.zeros(())
    slack = RELATIVE * ours.abs() + ABSOLUTE * reach
    same = ((ours - theirs).abs() <= slack) & finite
    return same | (~ours.isfinite() & ~theirs.isfinite())


def _not_exact(
    name: str, scheme: WeightScheme, stored: Tensor, source: Tensor
) -> Iterator[Finding]:
    """What ckptq finds to be the source's own numbers has to be so by the libraries too."""
    differ = int((~same_numbers(stored, source, scheme)).sum())
    if differ:
        found = f"{differ:,} of {source.numel():,} elements differ from the source by the libraries"
        yield finding("decoder-disagrees", name, found=found, wanted="none, as ckptq finds")


def _apart(name: str, ours_db: float, theirs_db: float) -> Iterator[Finding]:
    """Whether the libraries find the stored weight further from the source than ckptq does."""
    if theirs_db < ours_db - CLOSE_DB and theirs_db < EXACT_DB:
        found = f"{theirs_db:.1f} dB from the source by the libraries, {ours_db:.1f} dB by ckptq"
        yield finding("decoder-disagrees", name, found=found, wanted="the same distance from both")
