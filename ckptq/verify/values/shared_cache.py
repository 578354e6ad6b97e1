"""A cache is read with the scale that wrote it: by layers that read another one's, and by latent
attention, which reads the same row as k and as v."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding, ScaleRow
from ckptq.verify.subject import Subject


def check_shared_cache(subject: Subject, rows: Iterable[ScaleRow]) -> Iterator[Finding]:
    """k and v scales that differ from those of the layer whose cache it is."""
    values = {row.tensor: row.values for row in rows}
    for module, owner in subject.cache_owners.items():
        for which in "kv":
            tensor = subject.cache_scales.get((module, which))
            own = subject.cache_scales.get((owner, which))
            if tensor is None or own is None:
                continue
            found, wanted = values.get(tensor.name), values.get(own.name)
            if found is not None and wanted is not None and found != wanted:
                owners = f"{_some(wanted)}, as {own.name}"
                yield finding("shared-cache-scale", tensor, found=_some(found), wanted=owners)


def check_latent(subject: Subject, rows: Iterable[ScaleRow]) -> Iterator[Finding]:
    """k and v scales of latent attention that differ; those per head are a fault of their own."""
    if subject.declared.kv_strategy == "attn_head":
        return
    values = {row.tensor: row.values for row in rows}
    for module, kind in subject.attention.items():
        k, v = (subject.cache_scales.get((module, which)) for which in "kv")
        if kind != "latent" or k is None or v is None:
            continue
        found, wanted = values.get(v.name), values.get(k.name)
        if found is not None and wanted is not None and found != wanted:
            as_k = f"{_some(wanted)}, as {k.name}"
            yield finding("latent-scales-differ", v, found=_some(found), wanted=as_k)


def _some(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
