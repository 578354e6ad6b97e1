"""Fused experts as their family publishes them, and the parts that other checkpoints store.

Quantized checkpoints hold experts one by one; transformers computes with the 3-D tensors of the
family. A window says where in such a tensor a part lies.

Shape letters: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.view import View
from ckptq.models.family import FusedExperts, family_of
from ckptq.models.modules import Linear, cut_experts, read_layout
from ckptq.spec import TensorSpec

Windows = Mapping[str, tuple[tuple[str, View], ...]]
"""Fused tensor -> (name of a part, where it lies in it)."""

FIRST_PART = {"gate_up_proj": "gate_proj", "down_proj": "down_proj"}

EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>[^.]+\.(weight|bias))$")


def windows_of(like: Checkpoint) -> Windows:
    """The windows of the fused tensors that this checkpoint holds."""
    return _by_tensor(read_layout(like).linears.values())


def windows_for(ckpt: Checkpoint, specs: Mapping[str, TensorSpec]) -> Windows:
    """The windows of the fused tensors that the parts in a checkpoint would make together.

    `specs` are the unquantized tensors by name, experts one by one. Empty for a family that
    publishes its experts so.

    Example, Llama-4: "...experts.{0..15}.{gate,up}_proj.weight" [I, H] lie in
    "...experts.gate_up_proj" [E, H, 2I].
    """
    layout = family_of(ckpt.config).fused_experts
    if layout is None:
        return {}
    found: list[Linear] = []
    for experts, (count, parts) in _experts(specs).items():
        for which, projection in FIRST_PART.items():
            weight, bias = parts.get(f"{projection}.weight"), parts.get(f"{projection}.bias")
            if weight is not None:
                fused, beside = _fused(ckpt, layout, f"{experts}.{which}", count, weight, bias)
                found += cut_experts(layout, fused, beside)
    return _by_tensor(found)


def _fused(
    ckpt: Checkpoint,
    layout: FusedExperts,
    name: str,
    count: int,
    weight: TensorSpec,
    bias: TensorSpec | None,
) -> tuple[StoredTensor, StoredTensor | None]:
    """The tensors [E, in, out] or [E, out, in] and [E, out] of `count` experts.

    `weight` and `bias` are those of the first part of one of them.
    """
    outs = weight.shape[0] * (2 if name.endswith("gate_up_proj") else 1)
    ins = weight.shape[1]
    matrix = (ins, outs) if layout.transposed else (outs, ins)
    stacked = TensorSpec(weight.dtype, (count, *matrix))
    fused = StoredTensor(name, stacked, ckpt.path, 0)
    if bias is None:
        return fused, None
    return fused, StoredTensor(f"{name}_bias", TensorSpec(bias.dtype, (count, outs)), ckpt.path, 0)


def _experts(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, dict[str, TensorSpec]]]:
    """List of experts -> how many there are, and the tensors of the first by their last names."""
    counts: dict[str, int] = defaultdict(int)
    first: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in specs.items():
        if match := EXPERT.match(name):
            experts, index = match["experts"], int(match["index"])
            counts[experts] = max(counts[experts], index + 1)
            if index == 0:
                first[experts][match["part"]] = spec
    return {experts: (counts[experts], parts) for experts, parts in first.items()}


def _by_tensor(linears: Iterable[Linear]) -> Windows:
    found: dict[str, list[tuple[str, View]]] = defaultdict(list)
    for name, view in _views(linears):
        if view.index is not None or view.vector:
            found[view.stored.name].append((name, view))
    return {name: tuple(parts) for name, parts in found.items()}


def _views(linears: Iterable[Linear]) -> Iterator[tuple[str, View]]:
    for linear in linears:
        if isinstance(linear.weight, View):
            yield f"{linear.name}.weight", linear.weight
        if linear.bias is not None:
            yield f"{linear.name}.bias", linear.bias
