"""Checkpoints that `ckptq permute` made, and the repairs that `verify` proposes, carried out."""

import pytest
from verify_checkpoints import convert, copy_of, recipe
from verify_faults import turn

from ckptq.convert.permute import PermuteRequest, permute
from ckptq.permute.effect import Part
from ckptq.rope_order import RopeOrder
from ckptq.verify.run import verify


def permuted(folder, out, to, only=tuple(Part)):
    permute(PermuteRequest(model=folder, out=out, to=to, only=only))
    return out


@pytest.mark.parametrize("weights", ["fp8-channel", "int4", "int8", "mxfp4", "kv"])
def test_a_baked_order_is_compared_in_the_sources(good, tmp_path, weights):
    folder, source = good("llama4", weights, True)
    out = permuted(folder, tmp_path / "half-split", RopeOrder.HALF_SPLIT)
    report = verify(out, source)
    assert report.findings == ()
    assert [note.code for note in report.notes] == ["rope-order"]
    assert report.checks["linears compared"] == report.checks["linears quantized"]


def test_a_permuted_source_and_what_is_made_from_it(sources, tmp_path):
    source = permuted(sources("llama4"), tmp_path / "source", RopeOrder.HALF_SPLIT)
    out = convert(source, tmp_path / "out", recipe("int8"))
    for original in (source, sources("llama4")):
        report = verify(out, original)
        assert report.findings == ()
        assert [note.code for note in report.notes] == ["rope-order"]
        for engine in ("vllm", "transformers"):
            assert verify(out, original, engine=engine).counts == {"arrives-wrong": 4}


def test_a_source_of_another_family_is_no_source(good, sources):
    """Rows in another order than that family's, and no row of the source to compare them with."""
    folder, _ = good("llama4", "int8")
    report = verify(folder, sources("llama"))
    assert {"config-differs", "names-moved"} <= report.counts.keys()
    assert report.checks["linears compared"] == 0


REPAIRS = [
    ("fp8-channel", (Part.SCALES,), "scale-permuted"),
    ("int4", (Part.SCALES,), "scale-permuted"),
    ("int4", (Part.WEIGHTS,), "codes-permuted"),
    ("int8", tuple(Part), "rows-permuted"),
]


@pytest.mark.parametrize(("weights", "parts", "code"), REPAIRS)
def test_the_proposed_repair_mends_it(good, tmp_path, weights, parts, code):
    """Somebody's tool permuted some tensors; the command that the finding names puts them back."""
    folder, source = good("llama4", weights)
    editor = copy_of(folder, tmp_path / "broken")
    turn(editor, parts)
    found = verify(editor.save(), source).findings
    assert {finding.code for finding in found} == {code}
    only = "" if parts == tuple(Part) else f" --only {parts[0]}"
    commands = {finding.repair for finding in found}
    assert commands == {f"`ckptq permute CKPT OUT --to interleaved{only}`"}
    if parts == tuple(Part):
        editor.metadata["ckptq.rope_order"] = "half-split"
        editor.config["ckptq"] = {"rope_order": "half-split"}
        editor.save()
    mended = permuted(editor.folder, tmp_path / "mended", RopeOrder.INTERLEAVED, parts)
    report = verify(mended, source, engine="vllm")
    assert report.findings == ()


def test_only_scales_marked_and_moved_is_a_fault(good, tmp_path):
    """The mark is true, and no engine can use it."""
    folder, source = good("llama4", "int8")
    out = permuted(folder, tmp_path / "scales", RopeOrder.HALF_SPLIT, [Part.SCALES])
    report = verify(out, source, engine="vllm")
    assert report.counts == {"rope-order-mixed": 1, "arrives-wrong": 4}
    assert report.findings[0].repair == "`ckptq permute CKPT OUT --to interleaved --only scales`"


@pytest.mark.parametrize("weights", ["fp8-static", "kv"])
def test_weights_whose_scales_no_order_moves_are_permuted_alone(good, tmp_path, weights):
    """One scale for a whole tensor is in every order, and `--only scales` would be refused."""
    folder, source = good("llama4", weights, weights == "kv")
    out = permuted(folder, tmp_path / "weights", RopeOrder.HALF_SPLIT, [Part.WEIGHTS])
    report = verify(out, source)
    assert report.findings == ()
    assert [note.code for note in report.notes] == ["rope-order"]


@pytest.mark.parametrize("weights", ["fp8-channel", "int8", "int4"])
def test_a_mark_that_is_not_true(good, tmp_path, weights):
    folder, source = good("llama4", weights)
    editor = copy_of(folder, tmp_path / "marked")
    editor.metadata["ckptq.rope_order"] = "half-split"
    editor.config["ckptq"] = {"rope_order": "half-split"}
    report = verify(editor.save(), source)
    assert report.counts == {"rows-permuted": 4}
    assert all("remove the mark" in finding.repair for finding in report.findings)


def test_a_tensor_that_fits_no_heads_leaves_the_others_in_their_order(good, tmp_path):
    """Only it is wrong; what is marked as half-split is so."""
    folder, source = good("llama4", "fp8-channel", True)
    editor = copy_of(permuted(folder, tmp_path / "half", RopeOrder.HALF_SPLIT), tmp_path / "copy")
    name = editor.named("layers.0.self_attn.k_scale")
    editor.tensors[name] = editor.tensors[name].repeat(3, 1, 1)
    assert verify(editor.save(), source).counts == {"kv-scale-shape": 1}
