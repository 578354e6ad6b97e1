"""Scales of Linears that engines merge into one, must be the same if each has only one.

vLLM 0.32: weight scales of q/k/v and of gate/up are merged by requantizing to the largest; input
scales of an expert's gate and up must be equal (`input_scales of w1 and w3 of a layer must be
equal`), those of other sets are merged by taking the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptq.checkpoint.read import Files, read_tensor
from ckptq.models.witnesses import Witnesses
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.subject import EXPERT

EQUAL = 1e-5
"""vLLM's tolerance for the input scales of an expert."""


def check_fused_scales(
    witnesses: Witnesses, linears: Mapping[str, StoredLinear], files: Files
) -> Iterator[Finding]:
    """Sets of which the members do not share what should be one number."""
    for name in linears:
        names = witnesses.fused_set(name, linears)
        members = [linears[n] for n in names]
        if len(members) > 1 and names[0] == name:
            lone = {"tensor": "weight_scale", "tensor_group": "weight_global_scale"}
            inputs = ("input_scale", "input_global_scale")
            for local in (*inputs, lone.get(members[0].scheme.strategy)):
                if local is not None:
                    yield from _one_scale(members, local, files)


def _one_scale(members: list[StoredLinear], local: str, files: Files) -> Iterator[Finding]:
    tensors = [m.module.tensors[local] for m in members if local in m.module.tensors]
    if len(tensors) < 2 or any(tensor.spec.numel != 1 for tensor in tensors):
        return
    values = [float(read_tensor(tensor, files)) for tensor in tensors]
    if max(values) - min(values) <= EQUAL * abs(max(values)):
        return
    split = EXPERT.match(members[0].name) is not None and local == "input_scale"
    code = "input-scale-split" if split else "fused-scales-differ"
    said = ", ".join(
        f"{m.name.rpartition('.')[2]} {v:.6g}" for m, v in zip(members, values, strict=False)
    )
    yield finding(code, tensors[0], found=said, wanted="the same number for the whole set")
