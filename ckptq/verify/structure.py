"""All that headers and config.json can tell: no tensor data is read."""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint.open import Problems
from ckptq.verify.blocks import check_blocks
from ckptq.verify.cache import check_cache
from ckptq.verify.completeness import check_completeness
from ckptq.verify.files import check_files
from ckptq.verify.geometry import check_geometry
from ckptq.verify.linears import check_linears
from ckptq.verify.report import Finding
from ckptq.verify.rope import check_rope
from ckptq.verify.subject import Subject
from ckptq.verify.tensors import check_tensors


def check_structure(subject: Subject, problems: Problems) -> Iterator[Finding]:
    """Findings in the order of a reader's questions: files, Linears, tensors, cache, RoPE."""
    yield from check_files(subject, problems)
    yield from check_linears(subject)
    yield from check_tensors(subject)
    yield from check_completeness(subject)
    yield from check_blocks(subject)
    yield from check_cache(subject)
    yield from check_geometry(subject)
    yield from check_rope(subject)
