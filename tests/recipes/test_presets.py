"""Every preset of compressed-tensors is a scheme: a recipe that llm-compressor reads, in a layout
that vLLM 0.32 reads, with a rule for inputs that `evaluate` knows."""

from __future__ import annotations

import pytest
import yaml
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from ckptq.errors import UsageError
from ckptq.evaluate.linears.inputs import input_scheme
from ckptq.recipes.args import Args
from ckptq.recipes.load import describe, load_scheme, load_text
from ckptq.recipes.preset import EMPTY, is_unread, preset_names, preset_text
from ckptq.recipes.scheme import Group

PRESETS = preset_names()

NAMED_ALIKE = {"W8A8": "w8a8", "NVFP4": "nvfp4", "MXFP8": "mxfp8"}


def vllm_class(group: Group) -> str:
    """What `CompressedTensorsConfig._get_scheme_from_parts` of vLLM 0.32 makes of a Linear's group,
    on Hopper; KeyError where that raises NotImplementedError."""
    weights, inputs = group.weights or Args(), group.input_activations
    bits, strategy, integer = weights.num_bits, weights.strategy, weights.type == "int"
    if strategy == "tensor_group":
        return "W4A4Fp4"
    if not integer and weights.scale_dtype == "uint8":
        return {4: "W4A4Mxfp4", 8: "W8A8Mxfp8"}[bits]
    if integer and inputs is None:
        return {"pack-quantized": "WNA16"}[str(group.format)]
    assert inputs is not None
    if integer and inputs.type == "float":
        return {("pack-quantized", 4): "W4A8Fp8"}[str(group.format), bits]
    if integer and group.format == "pack-quantized":
        return {8: "WNA8Int", 4: "WNA4Int"}[inputs.num_bits]
    if not integer:
        return {"float-quantized": "W8A8Fp8"}[str(group.format)]
    return {(8, 8): "W8A8Int8", (4, 8): "W4A8Int"}[bits, inputs.num_bits]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_llm_compressor_means_by_it(name):
    """The numbers are the preset's own, from the preset's name and from the recipe that is kept."""
    (group,), (kept,) = load_scheme(name).groups, load_text(name, load_scheme(name).text).groups
    assert group == kept
    for ours, theirs in (
        (group.weights, PRESET_SCHEMES[name]["weights"]),
        (group.input_activations, PRESET_SCHEMES[name].get("input_activations")),
    ):
        assert (ours is None) == (theirs is None)
        said = theirs.model_dump(mode="json", exclude_none=True) if theirs else {}
        for key, value in said.items():
            assert value == {} or key == "zp_dtype" or ours.to_dict()[key] == value, key


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_in_a_layout_that_vllm_has_a_class_for(name):
    (group,) = load_scheme(name).groups
    assert vllm_class(group)
    scheme = group.weight_scheme()
    packed = scheme.codes == "weight_packed"
    assert packed == (
        vllm_class(group) in {"WNA16", "WNA8Int", "WNA4Int", "W4A8Fp8", "W4A4Fp4", "W4A4Mxfp4"}
    )


@pytest.mark.parametrize("name", ["W2A8", "W4A4", "W7A8", "W4AFP8"])
def test_the_layout_that_compressed_tensors_infers_has_none(name):
    """The twin: "int-quantized", by the preset's name alone."""
    modifier = {"targets": ["Linear"], "scheme": name, "ignore": ["lm_head"]}
    text = yaml.safe_dump(
        {"quantization_stage": {"quantization_modifiers": {"QuantizationModifier": modifier}}}
    )
    (group,) = load_text(name, text).groups
    assert group.format == "int-quantized"
    with pytest.raises(KeyError):
        vllm_class(group)


@pytest.mark.parametrize("name", PRESETS)
def test_evaluate_knows_how_a_preset_rounds_inputs(name):
    (group,) = load_scheme(name).groups
    if group.input_activations is None:
        assert name.endswith(("A16", "ASYM"))
        return
    rule = input_scheme(group.input_activations, name)
    assert rule.static == (group.input_scale is not None)
    assert rule.static == (name in ("FP8", "NVFP4"))


def test_all_presets_are_listed_and_taken_in_any_case():
    assert set(PRESETS) < set(describe())
    assert EMPTY not in describe()
    for preset, own in NAMED_ALIKE.items():
        assert load_scheme(preset) == load_scheme(own)
    assert load_scheme("w2a8") == load_scheme("W2A8")


def test_the_preset_that_quantizes_nothing_is_refused_by_name():
    with pytest.raises(UsageError, match=r"UNQUANTIZED .* quantizes nothing"):
        load_scheme("unquantized")
    with pytest.raises(UsageError, match="UNQUANTIZED"):
        preset_text(EMPTY)


def test_fp6_which_no_engine_reads_is_refused_by_name(monkeypatch):
    """MXFP6A16 and MXFP6A8 came with compressed-tensors 0.20."""
    assert is_unread(QuantizationArgs.model_construct(num_bits=6, type="float"))
    try:
        weights = QuantizationArgs(num_bits=6, type="float", strategy="group", group_size=32)
    except NotImplementedError:
        pytest.skip("this compressed-tensors has no FP6")
    monkeypatch.setitem(PRESET_SCHEMES, "MXFP6A16", {"weights": weights})
    with pytest.raises(UsageError, match=r"MXFP6A16: vLLM .* no class that reads weights in FP6"):
        load_scheme("MXFP6A16")
    assert "MXFP6A16" not in describe()
