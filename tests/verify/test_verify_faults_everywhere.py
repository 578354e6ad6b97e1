"""Every fault in every format that it can be made in, those it was not written for included.

`FULL_MATRIX=1` tries all of them; by default, each fault is tried in one other format.
"""

from __future__ import annotations

import copy
import hashlib
import os

import pytest
import torch
from test_verify_faults import FAULTS
from tiny.formats import FORMATS
from verify_checkpoints import Editor
from verify_faults import Fault

from ckptq.errors import CkptqError
from ckptq.verify.run import verify

ELSEWHERE = (*FORMATS, "kv")
NOT_THERE = (LookupError, StopIteration, ValueError, RuntimeError, AssertionError, CkptqError)
"""What an injection ends in where the format does not have what it would break."""


def others(number: int, fault: Fault) -> list[str]:
    """The formats that this fault is tried in here."""
    known = (*fault.weights, *NO_FAULT_HERE.get(fault.name, ()))
    found = [name for name in ELSEWHERE if name not in known]
    return found if os.environ.get("FULL_MATRIX") else found[number % max(len(found), 1) :][:1]


NO_FAULT_HERE = {
    # the rows of q and k do not move: their scales are one, or they are not quantized
    "mark-only-the-scales": ("kv", "int4-asym", "fp8-tensor", "fp8-static", "fp8-block"),
    # the scale of an input is there, and 1.0 is one that it may have
    "add-an-input-scale": ("fp8-static",),
    # notes: weights with the scale of another random tensor are as good as their own
    "take-the-scales-of-the-next-layer": ("fp8-tensor", "fp8-static"),
    "exchange-scales-of-layers": ("fp8-tensor", "fp8-static"),
    # the same: no Linear is quantized
    "leave-q-out-of-the-set": ("kv",),
    "leave-an-expert-unquantized": ("kv",),
    # a note: without quantized queries nothing needs them
    "drop-query-scales": ("kv",),
}
"""What leaves a checkpoint right in some formats."""

CASES = [
    pytest.param(fault, fault.families[0], weights, id=f"{fault.name}-{weights}")
    for number, fault in enumerate(FAULTS)
    for weights in others(number, fault)
]


def state(editor: Editor) -> tuple[object, ...]:
    """All that an injection can change, the weights as bytes."""
    tensors = {
        name: (tensor.dtype, tuple(tensor.shape), digest(tensor))
        for name, tensor in editor.tensors.items()
    }
    files = {path.name: path.read_bytes() for path in sorted(editor.folder.iterdir())}
    return tensors, copy.deepcopy(editor.config), dict(editor.metadata), files


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(("fault", "family", "weights"), CASES)
def test_no_fault_passes_for_right_in_another_format(broken, fault, family, weights):
    editor, source = broken(family, weights, fault.kv)
    (editor.folder.parent / "source").write_text(str(source))
    before = state(editor)
    try:
        fault.inject(editor)
    except NOT_THERE:
        pytest.skip("this format has nothing of the kind")
    if state(editor) == before:
        pytest.skip("this format has nothing of the kind")
    report = verify(editor.save(), source)
    told = {found.code for found in (*report.findings, *report.notes)}
    assert not report.ok or fault.code in told, f"{fault.code} passed for right; told: {told}"


def test_every_exception_is_one_of_a_fault_and_a_format():
    weights = {fault.name: fault.weights for fault in FAULTS}
    for name, formats in NO_FAULT_HERE.items():
        assert set(formats) <= set(ELSEWHERE) - set(weights[name])
