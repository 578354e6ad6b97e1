"""What quantize and verify read alike and wrongly is found: the libraries decode samples too."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny.formats import FORMATS
from verify_checkpoints import convert, copy_of, recipe

from ckptq.quantize import dispatch as decoding
from ckptq.spec import torch_dtype
from ckptq.verify.roundtrip import nearest
from ckptq.verify.roundtrip.decoders.check import kind_of, samples
from ckptq.verify.run import verify

BLOCK = 64


@pytest.fixture(scope="module", params=["F8_E8M0", "U8", "F32", "BF16"])
def block_source(request, sources, tmp_path_factory):
    """A Llama in FP8 blocks as DeepSeek ships them, its scales powers of two in some dtype."""
    folder = tmp_path_factory.mktemp("blocks") / request.param
    editor = copy_of(sources("llama"), folder)
    for name in [n for n in editor.tensors if n.endswith("_proj.weight")]:
        weight = editor.tensors[name].float()
        tiles = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3))
        exponent = torch.ceil(torch.log2(tiles / 448))
        scale = torch.exp2(exponent)
        wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        editor.tensors[name] = (weight / wide).to(torch.float8_e4m3fn)
        biased = exponent + 127 if request.param == "U8" else scale
        editor.tensors[f"{name}_scale_inv"] = biased.to(torch_dtype(request.param))
    editor.config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }  # fmt: skip
    return editor.save()


def in_the_scales_dtype(parts, scheme, shape, dtype):
    """What ckptq did: codes times scales in whatever dtype a file has for them."""
    codes, scale = parts["weight"].float(), parts["weight_scale"]
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]
    if scale.dtype == torch.uint8:
        return (codes * wide.float()).to(dtype)
    return (codes.to(scale.dtype).float() * wide.float()).to(dtype)


def test_verify_says_right_where_the_weights_are(block_source, sources, tmp_path):
    """Whether quantize reads these scales rightly is its own tests' business."""
    out = convert(block_source, tmp_path / "out", recipe("fp8-channel"))
    name = "model.layers.0.self_attn.q_proj.weight"
    made = load_file(out / "model.safetensors")
    weight = made[name].float() * made[f"{name}_scale"].float()
    wanted = load_file(sources("llama") / "model.safetensors")[name].float()
    right = bool((weight - wanted).norm() < 0.1 * wanted.norm())
    assert verify(out, block_source).ok == right


def test_a_decoder_that_is_wrong_in_quantize_and_verify_alike_is_found(
    block_source, tmp_path, monkeypatch
):
    monkeypatch.setattr(decoding, "dequantize", in_the_scales_dtype)
    out = convert(block_source, tmp_path / "out", recipe("fp8-channel"))
    damaged = block_source.name in ("F8_E8M0", "U8")
    counts = verify(out, block_source).counts
    assert ("decoder-disagrees" in counts) == damaged
    assert set(counts) <= {"decoder-disagrees"}, (
        "else the twin shows nothing: verify sees it anyhow"
    )


@pytest.mark.parametrize("weights", [w for w in FORMATS if w != "fp8-static"])
def test_every_format_that_verify_would_decode_wrongly_is_found(good, weights, monkeypatch):
    """ckptq's own decoding, off in the same way for what is stored and for what is wanted."""
    folder, source = good("llama", weights)
    assert verify(folder, source).counts == {}
    right = nearest.weights
    monkeypatch.setattr(
        "ckptq.verify.roundtrip.decoders.check.nearest.weights",
        lambda held, scheme, columns: right(held, scheme, columns) * 1.05,
    )
    assert verify(folder).counts["decoder-disagrees"] >= 3


def test_a_source_in_compressed_tensors_format_is_decoded_by_its_library(
    good, tmp_path, monkeypatch
):
    """From INT4 to FP8, its zero points read with the wrong sign by quantize and verify."""
    middle, _ = good("llama", "int4-asym")
    out = convert(middle, tmp_path / "right", recipe("fp8-channel"))
    assert verify(out, middle).counts == {}
    right = decoding.dequantize

    def wrong(parts, scheme, shape, dtype):
        return -right(parts, scheme, shape, dtype)

    monkeypatch.setattr(decoding, "dequantize", wrong)
    out = convert(middle, tmp_path / "wrong", recipe("fp8-channel"))
    assert set(verify(out, middle).counts) == {"decoder-disagrees"}


def test_the_cut_of_fused_experts_is_looked_at_too(good, monkeypatch):
    folder, source = good("llama4", "int8")
    assert verify(folder, source).counts == {}
    from ckptq.verify.roundtrip.decoders import libraries

    right = libraries._window
    monkeypatch.setattr(libraries, "_window", lambda view: right(view).flip(1))
    named = {f.tensor for f in verify(folder, source).findings if f.code == "decoder-disagrees"}
    assert any("experts" in name for name in named)


def test_each_kind_has_its_samples(good):
    """First, last and one more of every kind; a kind is a scheme, dtypes, and where it is cut."""
    from ckptq.checkpoint.open import open_checkpoint
    from ckptq.verify.config_judge import judge_config
    from ckptq.verify.one_pass import sound
    from ckptq.verify.structure.tensors import check_tensors
    from ckptq.verify.subject import Subject

    folder, source = good("llama4", "int4")
    ckpt = open_checkpoint(folder)
    subject = Subject(ckpt, open_checkpoint(source), judge_config(ckpt)[0])
    linears = {linear.name: linear for linear in sound(subject, check_tensors(subject))}
    kinds = {kind_of(linear) for linear in linears.values()}
    chosen = samples(linears)
    assert len(kinds) == 2, "plain, and cut out of a fused tensor"
    assert {kind_of(linear) for linear, _, _ in chosen} == kinds
    for kind in kinds:
        alike = [name for name, linear in linears.items() if kind_of(linear) == kind]
        looked = {linear.name for linear, _, _ in chosen if kind_of(linear) == kind}
        assert {alike[0], alike[-1]} <= looked
    assert [(c.name, s, e) for c, s, e in chosen] == [
        (c.name, s, e) for c, s, e in samples(linears)
    ]


def test_a_folder_whose_name_is_not_utf_8(sources, tmp_path):
    folder = tmp_path / os.fsdecode(b"out\xff")
    out = convert(sources("llama"), folder / "quantized", recipe("fp8-channel"))
    source = folder / "source"
    shutil.copytree(sources("llama"), source)
    assert verify(out, source).findings == ()
