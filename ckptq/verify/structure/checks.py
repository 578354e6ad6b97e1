"""All checks of headers and config.json; no tensor data is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from ckptq.checkpoint.open import Problems
from ckptq.verify.report import Finding
from ckptq.verify.structure.cache_scales import check_cache
from ckptq.verify.structure.completeness import check_completeness
from ckptq.verify.structure.expert_sizes import check_expert_sizes
from ckptq.verify.structure.folder import check_files
from ckptq.verify.structure.geometry import check_geometry
from ckptq.verify.structure.linears import check_linears
from ckptq.verify.structure.recipe import check_recipe
from ckptq.verify.structure.rope_readers import check_rope
from ckptq.verify.structure.whole_blocks import check_blocks
from ckptq.verify.subject import Subject


def check_structure(
    subject: Subject, problems: Problems, by_linear: Mapping[str, tuple[Finding, ...]]
) -> Iterator[Finding]:
    """Findings in the order of a reader's questions: files, Linears, recipe, tensors, cache, RoPE.

    `by_linear` is what `check_tensors` found.
    """
    yield from check_files(subject, problems)
    yield from check_linears(subject)
    yield from check_recipe(subject)
    yield from chain.from_iterable(by_linear.values())
    yield from check_completeness(subject)
    yield from check_blocks(subject)
    yield from check_cache(subject)
    yield from check_geometry(subject)
    yield from check_expert_sizes(subject)
    yield from check_rope(subject)
