"""Without a source: compare with the model that transformers builds from config.json. Headers only.

Checks only tensors outside any scheme: norms, biases, embeddings, tensors without a place, and
sizes. Families that transformers lacks, and configs that it refuses, are not checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.models.family import LAYER
from ckptq.numbered import starred
from ckptq.plan.left import EXPECTED
from ckptq.printable import listed
from ckptq.spec import TensorSpec
from ckptq.verify.engine.transformers import (
    CACHE_SCALES,
    HARMLESS,
    lacking,
    left_over,
    submodule,
    unlike,
)
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import CODES, SCALES, Subject

if TYPE_CHECKING:
    from ckptq.models.tree.by_headers import Loaded

EXPERTS = ".experts"
"""Merged on loading, and judged expert by expert elsewhere; their biases are not."""


OTHER_PARTS = re.compile(r"(^|[._])(mtp|nextn|vision|visual|vit|audio|image|speech|talker|lora)")
"""In names of branches that other models read."""


def check_whole(subject: Subject, told: Iterable[Finding]) -> Iterator[Finding]:
    """Parameters without a tensor, tensors without a parameter, and differing sizes; skips modules
    with findings in `told`."""
    from ckptq.models.tree.by_headers import load_by_headers

    told = list(told)
    if not subject.declared.present or any(one.code == "names-moved" for one in told):
        return
    try:
        loaded = load_by_headers(subject.ckpt)
    except MemoryError:
        raise
    except Exception:  # any: families and validators of configs raise what they like
        return
    failed = {place.rpartition(".")[0] for place in loaded.errors}
    named = {one.tensor for one in told if one.tensor is not None}
    failed |= named | {name.rpartition(".")[0] for name in named}
    if any(one.code == "layer-missing" for one in told):
        failed |= _in_missing_layers(subject.ckpt, loaded)
    yield from _missing(loaded, failed)
    yield from _unknown(subject.ckpt, loaded, failed)
    yield from _sizes(loaded, failed)
    yield from _strays(subject, loaded)


def _in_missing_layers(ckpt: Checkpoint, loaded: Loaded) -> set[str]:
    """Modules of layers of which nothing is stored."""
    there = {m[0] for name in ckpt.tensors if (m := LAYER.match(name))}
    names = (name for name, _ in loaded.model.named_modules())
    return {name for name in names if (m := LAYER.match(f"{name}.")) and m[0] not in there}


def _missing(loaded: Loaded, failed: Collection[str]) -> Iterator[Finding]:
    for module, locals_ in lacking(loaded).items():
        for local in locals_ if module not in failed else ():
            if _of_scheme(loaded, module, local):
                continue
            place = f"{module}.{local}" if module else local
            wanted = f"{loaded.wanted[place]}, as in {_class(loaded)}"
            yield finding("tensor-missing", place, found="no such tensor", wanted=wanted)


def _of_scheme(loaded: Loaded, module: str, local: str) -> bool:
    """Codes and scales, which are checked against the config; attention scales, which
    compressed-tensors expects for other modules than vLLM; and tied modules, whose codes
    transformers does not tie."""
    if local.endswith("bias"):
        return False
    if local in CACHE_SCALES:
        return True
    if module in loaded.tied:
        return True
    quantized = getattr(submodule(loaded, module), "quantization_scheme", None) is not None
    return local in SCALES or EXPERTS in f".{module}" or (quantized and local in CODES)


def _unknown(ckpt: Checkpoint, loaded: Loaded, failed: Collection[str]) -> Iterator[Finding]:
    for module, names in left_over(loaded).items():
        for name in names if module not in failed and EXPERTS not in f".{module}" else ():
            local = name.rpartition(".")[2]
            tensor = ckpt.tensors.get(name)
            if tensor is not None and local not in (*CODES, *SCALES, *CACHE_SCALES):
                code = "tensor-extra" if local == "bias" else "tensor-unknown"
                wanted = f"no such tensor: {_class(loaded)} does not have it"
                yield finding(code, tensor, found=str(tensor.spec), wanted=wanted)


def _sizes(loaded: Loaded, failed: Collection[str]) -> Iterator[Finding]:
    """One finding for all tensors that differ only in their numbers."""
    seen: set[tuple[str, TensorSpec, TensorSpec]] = set()
    for module, places in unlike(loaded).items():
        for place in places if module not in failed and EXPERTS not in f".{module}" else ():
            found, wanted = loaded.found[place], loaded.wanted[place]
            kind = starred(place), found, wanted
            if found.shape == wanted.shape or place.rpartition(".")[2] in SCALES or kind in seen:
                continue
            seen.add(kind)
            held, built = (
                f"{list(found.shape)} on disk",
                f"{list(wanted.shape)} in {_class(loaded)}",
            )
            repair = "restore the config.json of this model"
            yield finding(
                "config-shapes", place, file=CONFIG, found=held, wanted=built, repair=repair
            )


def _strays(subject: Subject, loaded: Loaded) -> Iterator[Finding]:
    """One note of tensors outside of every module and layer. They may be parts that the class does
    not build, of which those that are known (towers, multi-token prediction) are left out."""
    inside = {name for names in left_over(loaded).values() for name in names}
    names = sorted(n for n in loaded.left_over - inside if _is_stray(subject, n))
    if names:
        yield finding(
            "tensor-placeless", names[0], found=listed(names),
            wanted=f"tensors of {_class(loaded)}, which leaves these out",
        )  # fmt: skip


def _is_stray(subject: Subject, name: str) -> bool:
    known = LAYER.match(name) or OTHER_PARTS.search(name) or HARMLESS.search(name)
    return not known and subject.witnesses.why_kept(name.rpartition(".")[0]) not in EXPECTED


def _class(loaded: Loaded) -> str:
    return f"transformers' {type(loaded.model).__name__}"
