"""Weights of a quantized source that are kept as stored: their scales are right.

`quantize --scheme kv-fp8-...` and `--scheme repack` keep such weights. Their scales may come from
another observer than minimum and maximum, and decoded weights do not always reach the original
extremes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptq.checkpoint.read import Files, read_tensor
from ckptq.verify.roundtrip.tally import Tally, same_bytes
from ckptq.verify.roundtrip.undo import Undo
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.subject import Subject

SCALES = ("weight_scale", "weight_zero_point", "weight_global_scale")


def with_kept_scales(
    subject: Subject,
    linears: Mapping[str, StoredLinear],
    tallies: Mapping[str, Tally],
    files: Files,
    undo: Undo,
) -> dict[str, Tally]:
    """The tallies, without wrong scales where codes are right and the scales are the source's."""
    return {
        name: replace(tally, scales_wrong=0, zeros_wrong=0)
        if tally.scales_wrong
        and tally.wrong <= tally.twice
        and (tally.exact == tally.elements or _kept(subject, linears[name], files, undo))
        else tally
        for name, tally in tallies.items()
    }


def _kept(subject: Subject, linear: StoredLinear, files: Files, undo: Undo) -> bool:
    """Whether its scales and zero points are the source's of these names, byte for byte."""
    if subject.source is None or linear.module.origin is None:
        return False
    for local in SCALES:
        ours = linear.tensors.get(local)
        theirs = subject.source.tensors.get(f"{linear.module.origin.name}.{local}")
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None or ours.spec != theirs.spec:
            return False
        restored = undo.restore(ours.name, read_tensor(ours, files))
        if not same_bytes(restored, read_tensor(theirs, files)):
            return False
    return True
