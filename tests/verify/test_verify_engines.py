"""What arrives in an engine: right, or named where its loader does not move what it should."""

import pytest
import torch
from faults_structure import quantize_llama4_queries_asymmetrically
from verify_checkpoints import convert, copy_of, recipe
from verify_faults import turn

from ckptq.convert.permute import PermuteRequest, permute
from ckptq.errors import UsageError
from ckptq.permute.effect import Part
from ckptq.rope_order import RopeOrder
from ckptq.verify.loaders import ENGINES
from ckptq.verify.run import verify

RIGHT = [
    ("vllm", "fp8-channel"),
    ("vllm", "int8"),
    ("vllm", "int4"),
    ("vllm", "int4-channel"),
    ("vllm", "fp8-tensor"),
    ("vllm", "kv"),
    ("transformers", "fp8-channel"),
    ("transformers", "int4"),
]


def of_queries(report):
    return [a for a in report.arrivals if a.tensor.endswith(("q_proj", "k_proj"))]


@pytest.mark.parametrize(("engine", "weights"), RIGHT)
def test_llama4_arrives(good, engine, weights):
    report = verify(*good("llama4", weights, weights in ("kv", "fp8-channel")), engine=engine)
    assert report.findings == ()
    assert len(of_queries(report)) == 4
    assert all(arrival.ok for arrival in report.arrivals)


def test_a_weight_that_the_format_suits_badly_arrives_as_it_is_stored(sources, tmp_path):
    """A column far beyond the others costs 20 dB; scales in the wrong order still show."""
    source = copy_of(sources("llama4"), tmp_path / "source")
    for name in (n for n in source.tensors if n.endswith("_proj.weight")):
        source.tensors[name][..., 0] += 2 * torch.rand(source.tensors[name].shape[:-1])
    out = convert(source.save(), tmp_path / "out", recipe("int8"))
    right = verify(out, source.folder, engine="vllm")
    assert right.findings == ()
    assert "low-snr" in {note.code for note in right.notes}
    turned = tmp_path / "turned"
    permute(PermuteRequest(model=out, out=turned, to=RopeOrder.HALF_SPLIT, only=[Part.SCALES]))
    found = verify(turned, source.folder, engine="vllm").counts
    assert found["arrives-wrong"] == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_llama_is_permuted_by_no_engine(good, engine):
    report = verify(*good("llama", "fp8-channel", True), engine=engine)
    assert report.findings == ()
    assert of_queries(report) == []
    assert len(report.arrivals) >= 6


def test_zero_points_stay_behind_in_vllm_and_can_be_moved_ahead(good, tmp_path):
    """CONTRACT of asymmetric q/k: wrong in vLLM, right once zero points alone are half-split."""
    folder, source = good("llama4", "int4-asym")
    editor = copy_of(folder, tmp_path / "asym")
    quantize_llama4_queries_asymmetrically(editor)
    report = verify(editor.save(), source, engine="vllm")
    assert report.counts == {"rope-zero-points": 2, "arrives-wrong": 2}
    turn(editor, (Part.ZERO_POINTS,))
    mark = "zero-points=half-split"
    editor.metadata["ckptq.rope_order"] = mark
    editor.config["ckptq"] = {"rope_order": mark}
    assert verify(editor.save(), source, engine="vllm").findings == ()
    assert verify(editor.save(), source, engine="transformers").counts == {"arrives-wrong": 2}


def test_a_baked_order_is_permuted_twice_by_vllm(good, tmp_path):
    folder, source = good("llama4", "int8")
    editor = copy_of(folder, tmp_path / "baked")
    turn(editor, tuple(Part))
    editor.metadata["ckptq.rope_order"] = "half-split"
    editor.config["ckptq"] = {"rope_order": "half-split"}
    report = verify(editor.save(), source)
    assert report.findings == ()
    assert [note.code for note in report.notes] == ["rope-order"]
    report = verify(editor.save(), source, engine="vllm")
    assert report.counts == {"arrives-wrong": 4}
    assert all("permute CKPT OUT --to interleaved" in f.repair for f in report.findings)


def test_blocks_are_refused(good, tmp_path):
    folder, source = good("llama4", "fp8-block")
    editor = copy_of(folder, tmp_path / "block")
    quantize_llama4_queries_asymmetrically(editor)
    report = verify(editor.save(), source, engine="vllm")
    assert report.counts == {"rope-block-scales": 2, "engine-refuses": 2}


def test_scales_that_vllm_merges(good, tmp_path):
    """Shards of one fused set with scales of their own are requantized to the largest."""
    folder, source = good("llama", "fp8-tensor")
    assert verify(folder, source, engine="vllm").arrivals == ()
    editor = copy_of(folder, tmp_path / "apart")
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    editor.tensors[name] = editor.tensors[name] * 64
    arrivals = verify(editor.save(), source, engine="vllm").arrivals
    assert {a.tensor.rpartition(".")[2] for a in arrivals} == {"q_proj", "k_proj", "v_proj"}
    assert all("largest scale" in a.done for a in arrivals)


def test_a_missing_scale_is_the_engines_default(good, tmp_path):
    folder, source = good("llama", "fp8-channel", True)
    editor = copy_of(folder, tmp_path / "missing")
    del editor.tensors["model.layers.1.self_attn.v_scale"]
    report = verify(editor.save(), source, engine="vllm")
    assert report.counts == {"kv-scale-missing": 1, "engine-default": 1}


def test_a_merged_scale_near_one_is_no_default(good, tmp_path):
    """`done` says 1.02 then, which is not the 1.0 of a placeholder."""
    folder, source = good("llama", "fp8-tensor")
    editor = copy_of(folder, tmp_path / "apart")
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    editor.tensors[name] = torch.full_like(editor.tensors[name], 1.02)
    counts = verify(editor.save(), source, engine="vllm").counts
    assert counts["arrives-wrong"] == 1
    assert "engine-default" not in counts


@pytest.mark.parametrize("engine", ["nothing", "vllm-0.15", "sglang"])
def test_an_unknown_engine_is_refused(good, engine):
    with pytest.raises(UsageError, match="vllm, transformers"):
        verify(*good("llama", "int8"), engine=engine)
