"""Every fault is caught and named: its code, and the tensor where there is one to name.

`FULL_MATRIX=1` tries each fault in all its families times all its formats; by default each family
and each format of a fault comes once.
"""

import json
import os
from itertools import cycle, islice, product

import faults_cache
import faults_contradictions
import faults_conventions
import faults_rare
import faults_round_trip
import faults_structure
import pytest
import torch
from verify_checkpoints import Editor
from verify_faults import Fault

from ckptq.verify.kinds import KINDS
from ckptq.verify.run import verify

SECTIONS = (
    *(faults_structure, faults_cache, faults_round_trip, faults_rare, faults_conventions),
    faults_contradictions,
)
FAULTS = [fault for section in SECTIONS for fault in section.FAULTS]


def cells(fault: Fault) -> list[tuple[str, str]]:
    """(family, format) pairs that this fault is tried in here."""
    if os.environ.get("FULL_MATRIX"):
        return list(product(fault.families, fault.weights))
    number = max(len(fault.families), len(fault.weights))
    pairs = zip(cycle(fault.families), cycle(fault.weights), strict=False)
    return list(islice(pairs, number))


CASES = [
    pytest.param(fault, family, weights, id=f"{fault.name}-{family}-{weights}")
    for fault in FAULTS
    for family, weights in cells(fault)
]


ALONE_CASES = [case for case in CASES if case.values[0].alone]


def codes_of(fault: Fault, editor: Editor) -> set[str]:
    """Whoever changes what the config says of quantization departs from the recipe beside it."""
    written = json.loads((editor.folder / "config.json").read_text())["quantization_config"]
    changed = editor.config.get("quantization_config") != written
    return {fault.code, *fault.also, *(["recipe-differs"] if changed else [])}


@pytest.mark.parametrize(("fault", "family", "weights"), CASES)
def test_each_fault_is_named(broken, fault: Fault, family: str, weights: str):
    editor, source = broken(family, weights, fault.kv)
    (editor.folder.parent / "source").write_text(str(source))
    named = fault.inject(editor)
    allowed = codes_of(fault, editor)
    report = verify(editor.save(), source)
    mine = [f for f in (*report.findings, *report.notes) if f.code == fault.code]
    assert mine, f"found {report.counts}, {[note.code for note in report.notes]}"
    assert {f.code for f in report.findings} <= allowed
    if named is not None:
        assert any(named in (f.tensor or "") for f in mine), [f.tensor for f in mine]
    assert all(f.repair for f in mine)


@pytest.mark.parametrize(("fault", "family", "weights"), ALONE_CASES)
def test_what_contradicts_itself_is_named_without_a_source(broken, fault, family, weights):
    editor, _ = broken(family, weights, fault.kv)
    named = fault.inject(editor)
    allowed = codes_of(fault, editor)
    report = verify(editor.save())
    mine = [f for f in (*report.findings, *report.notes) if f.code == fault.code]
    assert mine, f"found {report.counts}, {[note.code for note in report.notes]}"
    assert {f.code for f in report.findings} <= allowed
    assert named is None or any(named in (f.tensor or "") for f in mine)


ALONE = {
    "invert-scales": "scale-implausible",
    "lose-the-prefix": "names-moved",
    "declare-more-key-heads": "config-shapes",
    "lose-the-end-of-a-download": "codes-empty",
    "tie-a-head-that-is-not-the-embedding": "tied-head",
    "forget-the-method": "quant-method",
    "seek-a-tensor-in-another-shard": "index-mismatch",
}


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in ALONE], ids=lambda f: f.name)
def test_some_are_named_without_a_source(broken, fault: Fault):
    editor, _ = broken("llama", "fp8-channel")
    fault.inject(editor)
    report = verify(editor.save())
    assert {f.code for f in report.findings} == {ALONE[fault.name]}


def test_experts_that_were_cut_along_the_wrong_axis(broken):
    """As `model_free_ptq` of llm-compressor 0.14 cuts Llama-4's [E, H, 2 I]."""
    editor, source = broken("llama4", "fp8-channel")
    name = editor.named("experts.1.gate_proj.weight")
    rows, columns = editor.tensors[name].shape
    editor.tensors[name] = torch.zeros(columns // 2, 2 * rows).to(torch.float8_e4m3fn)
    editor.tensors[f"{name}_scale"] = torch.ones(columns // 2, 1).bfloat16()
    found = {f.code: f for f in verify(editor.save(), source).findings}
    assert found.keys() == {"codes-shape", "scale-shape"}
    assert "wrong axis" in found["codes-shape"].repair


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_each_family_and_format_of_a_fault_is_tried(fault: Fault):
    families, weights = zip(*cells(fault), strict=True)
    assert set(families) == set(fault.families)
    assert set(weights) == set(fault.weights)


def test_there_are_enough_kinds():
    assert len({fault.code for fault in FAULTS if KINDS[fault.code].severity == "fault"}) >= 70
    assert {fault.code for fault in FAULTS} <= KINDS.keys()
