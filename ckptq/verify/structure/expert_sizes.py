"""Without a source: experts against the sizes in config.json, as transformers builds them of it.

It holds all experts of a layer as one parameter of three dimensions, in either orientation, gate
and up in one; so shapes are compared without their order. Headers only.

Shape letters: E experts, R rows and C columns of one expert's Linear.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint.open import CONFIG
from ckptq.models.experts import FUSED_WEIGHT
from ckptq.models.tree.module_tree import FusedParameter
from ckptq.numbered import starred
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import EXPERT, Subject


def check_expert_sizes(subject: Subject) -> Iterator[Finding]:
    """One finding for all experts that differ in their numbers alone."""
    if subject.source is not None or subject.witnesses.tree is None:
        return
    seen: set[str] = set()
    for name, found, wanted in (*_one_by_one(subject), *_fused(subject)):
        if starred(name) in seen:
            continue
        seen.add(starred(name))
        model = subject.witnesses.tree.model_class
        yield finding(
            "config-shapes", name, file=CONFIG, found=f"{found} on disk",
            wanted=f"{wanted} in transformers' {model} of these sizes",
            repair="restore the config.json of this model",
        )  # fmt: skip


def _one_by_one(subject: Subject) -> Iterator[tuple[str, str, str]]:
    for name, module in subject.modules.items():
        match, fused = EXPERT.match(name), _parameter(subject, name)
        if match is None or fused is None or not subject.witnesses.in_layers(name):
            continue
        if module.quantized and module.scheme is None:
            continue  # codes of an unknown format do not tell the weight's size
        E, *inner = fused.shape
        if int(match["index"]) >= E:
            yield name, f"expert {match['index']}", f"{E} experts"
        elif module.shape is not None and not _fits(module.shape, inner):
            yield name, str(list(module.shape)), f"experts of {inner}"


def _fused(subject: Subject) -> Iterator[tuple[str, str, str]]:
    for name, tensor in subject.ckpt.tensors.items():
        shape = tensor.spec.shape
        fused = _parameter(subject, name) if FUSED_WEIGHT.match(name) else None
        if fused is None or len(shape) != 3 or not subject.witnesses.in_layers(name):
            continue
        if shape[0] != fused.shape[0] or sorted(shape[1:]) != sorted(fused.shape[1:]):
            yield name, str(list(shape)), str(list(fused.shape))


def _parameter(subject: Subject, name: str) -> FusedParameter | None:
    """That of all experts which a tensor becomes part of, where it becomes part of one alone."""
    owner = subject.witnesses.owner(name)
    fused = owner.fused if owner is not None else None
    return None if fused is None or fused.dealt_out else fused


def _fits(shape: tuple[int, int], inner: list[int]) -> bool:
    """Whether a Linear of [R, C] is a slice of the parameter, or half of one, gate or up."""
    R, C = shape
    return sorted(inner) in (sorted((R, C)), sorted((2 * R, C)))
