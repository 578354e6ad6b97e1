"""Experts that a checkpoint stores as 3-D tensors: their layout, and whether to split them.

The orientation follows from the shapes and hidden_size, because a family may be published in
either. Which outputs belong to the gate follows from transformers' class.

Shape letters: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import SourceError
from ckptq.models.family import FusedExperts, family_of
from ckptq.models.tree.module_tree import FusedParameter
from ckptq.models.witnesses import Witnesses
from ckptq.spec import FLOATS

FUSED_WEIGHT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<which>gate_up_proj|down_proj)$")

ONE_EXPERT = re.compile(r"\.experts\.\d+\.")

EXPERTS = re.compile(r"\.(\w*experts|\w*moe)\.")


def experts_of(linear: str) -> str | None:
    """ "model.layers.0.mlp.experts.7.up_proj" -> "model.layers.0.mlp.experts"; None for others."""
    match = ONE_EXPERT.search(linear)
    return linear[: match.start()] + ".experts" if match else None


def fused_layouts(ckpt: Checkpoint, witnesses: Witnesses) -> dict[str, FusedExperts]:
    """Experts module -> how its 3-D tensors hold the experts, for those that can be cut.

    Experts that a witness does not know are left out: they stay fused and unquantized.
    SourceError for shapes that fit no orientation.
    """
    found: dict[str, FusedExperts] = {}
    for name, stored in ckpt.tensors.items():
        match = FUSED_WEIGHT.match(name)
        if match is None or match["experts"] in found or not holds_experts(witnesses, stored):
            continue
        layout = _layout(ckpt, witnesses, match["experts"])
        if layout is not None:
            found[match["experts"]] = layout
    return found


def why_whole(ckpt: Checkpoint, witnesses: Witnesses, name: str) -> str:
    """Why this 3-D tensor is not split into experts; "" if it can be."""
    match = FUSED_WEIGHT.match(name)
    if not match:
        return "fused experts that no engine loads one by one"
    name = f"{match['experts']}.gate_up_proj"  # down_proj alone is not cut either
    owner = witnesses.owner(name)
    if owner is None or owner.fused is None:
        return "fused experts that transformers does not know"
    if not owner.fused.gated:
        return "fused experts without a gate"
    if owner.fused.biased:
        return "fused experts with biases, which vLLM does not load one by one"
    if witnesses.engine is None and family_of(ckpt.config).fused_experts is not None:
        return ""
    if witnesses.engine is None or witnesses.engine.experts(name) is None:
        return "fused experts that vLLM does not know"
    return ""


def holds_experts(witnesses: Witnesses, stored: StoredTensor) -> bool:
    """Whether a tensor of a decoder layer holds all experts of that layer."""
    if not _is_fused(stored) or not witnesses.in_layers(stored.name):
        return False
    owner = witnesses.owner(stored.name)
    return (owner is not None and owner.fused is not None) or bool(EXPERTS.search(stored.name))


def _layout(ckpt: Checkpoint, witnesses: Witnesses, experts: str) -> FusedExperts | None:
    name = f"{experts}.gate_up_proj"
    owner = witnesses.owner(name)
    if owner is None or owner.fused is None or why_whole(ckpt, witnesses, name):
        return None
    sizes = _sizes(ckpt, owner.fused)
    parts = ("gate_up_proj", "down_proj")
    stored = {which: ckpt.tensors.get(f"{experts}.{which}") for which in parts}
    fits = [t for t in (False, True) if all(_fits(s, w, sizes, t) for w, s in stored.items() if s)]
    if len(fits) != 1:
        raise SourceError(_misfit(stored, sizes))
    return FusedExperts(transposed=fits[0], interleaved=owner.fused.interleaved)


def _sizes(ckpt: Checkpoint, fused: FusedParameter) -> tuple[int, int]:
    """(H, 2I), from hidden_size and the shape of transformers' own gate_up_proj."""
    _, a, b = fused.shape
    hidden = ckpt.text_config.get("hidden_size")
    return (a, b) if a == hidden else (b, a)


def _fits(stored: StoredTensor, which: str, sizes: tuple[int, int], transposed: bool) -> bool:
    """[E, 2I, H] and [E, H, I], or transposed [E, H, 2I] and [E, I, H]."""
    hidden, twice = sizes
    out_in = (twice, hidden) if which == "gate_up_proj" else (hidden, twice // 2)
    return stored.spec.shape[1:] == (out_in[::-1] if transposed else out_in)


def _misfit(stored: Mapping[str, StoredTensor | None], sizes: tuple[int, int]) -> str:
    hidden, twice = sizes
    there = [tensor for tensor in stored.values() if tensor is not None]
    found = ", ".join(f"{t.name} {list(t.spec.shape)}" for t in there)
    return (
        f"{there[0].file}: {found}; config.json declares experts with hidden size {hidden} and "
        f"intermediate size {twice // 2}: [E, {twice}, {hidden}] and [E, {hidden}, {twice // 2}], "
        "or both transposed"
    )


def _is_fused(stored: StoredTensor) -> bool:
    return len(stored.spec.shape) == 3 and stored.spec.dtype in FLOATS
