"""A good checkpoint has no finding: every format, every family, with its source and without."""

import pytest
from tiny.formats import FORMATS
from verify_checkpoints import FAMILIES, HEADS, KV_HEADS, Editor, convert, kv_recipe, recipe

from ckptq.verify.run import verify


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_have_no_finding(good, family, weights):
    folder, source = good(family, weights)
    report = verify(folder, source)
    assert report.findings == ()
    assert report.notes == ()
    assert report.checks["linears compared"] == report.checks["linears quantized"] > 0
    assert all(t.codes_wrong == t.scales_wrong == 0 for t in report.tensors)
    assert all(t.snr_db > t.floor_db for t in report.tensors)


@pytest.mark.parametrize("before", ["int4-asym", "fp8-block", "fp8-channel", "int8"])
def test_a_source_that_is_quantized(good, before, tmp_path):
    """Both have scales of the same names, and maybe of the same shapes; they are no copies."""
    source, _ = good("llama", before)
    report = verify(convert(source, tmp_path / "again", recipe("fp8-channel")), source)
    assert report.findings == ()
    assert report.checks["linears compared"] == report.checks["linears quantized"] > 0


@pytest.mark.parametrize("before", ["int4-asym", "int4-channel", "int8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("fast", [False, True])
def test_weights_that_were_kept_are_right(good, before, fast, tmp_path):
    """Decoded, they seldom reach the extremes that their scales were made of."""
    source, _ = good("llama", before)
    report = verify(convert(source, tmp_path / "kept", kv_recipe()), source, fast=fast)
    assert report.findings == report.notes == ()
    assert all(t.codes_wrong == t.scales_wrong == 0 for t in report.tensors)


def test_a_scale_of_weights_that_were_kept_is_not_lost(good, tmp_path):
    source, _ = good("llama", "fp8-channel")
    kept = Editor(convert(source, tmp_path / "kept", kv_recipe()))
    assert verify(kept.folder, source).findings == ()
    name = kept.named("up_proj.weight_scale")
    kept.tensors[name][5] *= 1.5
    assert {f.tensor for f in verify(kept.save(), source).findings} == {name}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_source(good, family):
    report = verify(good(family, "int4-asym")[0])
    assert report.findings == report.notes == ()
    assert report.tensors == ()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["fp8-channel", "kv"])
def test_cache_scales(good, family, weights):
    folder, source = good(family, weights, True)
    report = verify(folder, source)
    assert report.findings == report.notes == ()
    assert report.checks["cache scales"] == 3 * report.checks["attention layers"] > 0


def test_fast_compares_less(good):
    folder, source = good("llama", "fp8-channel")
    whole, fast = verify(folder, source), verify(folder, source, fast=True)
    assert fast.ok
    assert fast.checks["linears compared"] == whole.checks["linears compared"]


def test_heads_are_counted_in_each_layer(broken):
    """The config's count is wrong for Gemma-4's global layer, and its v_proj is not missing; vLLM
    loads scales per head for none, so that ckptq writes one a layer."""
    editor, source = broken("gemma4", "fp8-channel", True)
    assert verify(editor.save(), source, engine="vllm").findings == ()
    names = [name for name in editor.tensors if name.endswith(("k_scale", "v_scale", "q_scale"))]
    assert {tuple(editor.tensors[name].shape) for name in names} == {(1,)}
    attention = editor.quantization["config_groups"]["attention"]["input_activations"]
    for scheme in (editor.quantization["kv_cache_scheme"], attention):
        scheme["strategy"] = "attn_head"
    for name in names:
        heads = HEADS if "q_scale" in name else KV_HEADS if "layers.0" in name else 1
        editor.tensors[name] = editor.tensors[name].expand(heads, 1, 1)
    report = verify(editor.save(), source)
    faults = [(f.code, f.tensor) for f in report.findings if f.severity == "fault"]
    assert ("kv-heads-differ", "model.layers.1.self_attn") in faults
    assert {code for code, _ in faults} <= {"kv-heads-differ", "heads-alike"}
    name = editor.named("layers.1.self_attn.k_scale")
    editor.tensors[name] = editor.tensors[name].expand(2, 1, 1)
    report = verify(editor.save(), source)
    assert ("kv-scale-shape", name) in [(f.code, f.tensor) for f in report.findings]


def test_only_global_layers_may_lack_a_v_proj(broken):
    editor, _ = broken("gemma4", "fp8-channel")
    assert verify(editor.folder).findings == ()
    editor.config["layer_types"] = ["full_attention", "sliding_attention"]
    found = [(f.code, f.tensor) for f in verify(editor.save()).findings]
    assert found == [("tensor-missing", "model.layers.1.self_attn.v_proj.weight")]
