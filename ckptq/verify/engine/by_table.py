"""`--engine vllm` without vLLM's Python: what its table says about the model.

Modules that the table has not seen are never assumed to be right: a note counts them.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint.open import CONFIG
from ckptq.engines.table import load_table
from ckptq.engines.vllm import without_kernel
from ckptq.models.unserved import model_doubts
from ckptq.numbered import starred
from ckptq.printable import listed
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import EXPERT, Subject

ASK = "ask vLLM itself: --vllm-python PYTHON"


def foreseen(subject: Subject) -> Iterator[Finding]:
    """Why vLLM would not load the model; else a note of the quantized Linears that its table cannot
    judge."""
    quantized = [name for name, module in subject.modules.items() if module.quantized]
    doubts = list(model_doubts(subject.witnesses, quantized))
    for doubt in doubts:
        found = f"vllm, according to its table: {doubt}"
        wanted = "a checkpoint that it loads"
        repair = f"use transformers, or {ASK}"
        yield finding("engine-refuses", file=CONFIG, found=found, wanted=wanted, repair=repair)
    if not doubts:
        yield from _without_kernel(subject, quantized)
        yield from _unseen(subject, quantized)


def _without_kernel(subject: Subject, quantized: list[str]) -> Iterator[Finding]:
    for name in quantized:
        module = subject.modules[name]
        if module.group is None or module.shape is None or EXPERT.match(name):
            continue
        if reason := without_kernel(module.group, module.shape[1]):
            wanted = "a group size that it multiplies with"
            yield finding("engine-refuses", module, found=reason, wanted=wanted)


def _unseen(subject: Subject, quantized: list[str]) -> Iterator[Finding]:
    engine = subject.witnesses.engine
    unseen = [name for name in quantized if engine is None or engine.fate(name) is None]
    if not unseen:
        return
    kinds = list(dict.fromkeys(map(starred, unseen)))
    found = (
        f"{len(unseen)} of {len(quantized)} quantized Linears that the table of vLLM "
        f"{load_table().version} has not seen, or has seen built differently: "
        f"{listed(kinds)}"
    )
    yield finding("engine-unseen", found=found, wanted="modules that it has seen", repair=ASK)
