"""Whole shards, whole sources and rescaled rows: what many tensors tell together."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from verify_checkpoints import Editor, convert, copy_of, recipe, save_source, spelled_out

from ckptq.verify.run import verify

SHARD_BYTES = 1 << 17


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same architecture with other weights, as after another training run."""
    folder = save_source("llama", tmp_path_factory.mktemp("other") / "source")
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = (0.02 * noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("weights", ["fp8-channel", "int4"])
def test_a_shard_of_another_run(sources, other, tmp_path, weights):
    source = sources("llama")
    mine = convert(source, tmp_path / "mine", recipe(weights), SHARD_BYTES)
    theirs = convert(other, tmp_path / "theirs", recipe(weights), SHARD_BYTES)
    shards = sorted(path.name for path in mine.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert verify(mine, source).findings == ()
    shutil.copy(theirs / shards[1], mine / shards[1])
    found = verify(mine, source).findings
    assert [(f.code, f.file) for f in found] == [("stale-shard", shards[1])]


@pytest.mark.parametrize("weights", ["fp8-channel", "int4"])
def test_the_wrong_source(good, other, weights):
    """One finding says what a hundred would."""
    report = verify(good("llama", weights)[0], other)
    assert report.counts == {"other-source": 1}


@pytest.fixture
def rescaled(sources, tmp_path):
    """up_proj's rows divided, and down_proj's columns multiplied, by a number for each channel, as
    AWQ does; each on its own if asked."""

    def make(rows: bool, columns: bool, least: int = -1):
        folder = tmp_path / f"rescaled-{rows}-{columns}"
        shutil.copytree(sources("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        chance = torch.Generator().manual_seed(0)
        factor = 2.0 ** torch.randint(least, 2, (256,), generator=chance)
        for layer in range(2):
            up = f"model.layers.{layer}.mlp.up_proj.weight"
            down = f"model.layers.{layer}.mlp.down_proj.weight"
            if rows:
                tensors[up] = (tensors[up].float() / factor[:, None]).bfloat16()
            if columns:
                tensors[down] = (tensors[down].float() * factor).bfloat16()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8-channel"])
def test_rescaling_that_cancels_out(sources, rescaled, tmp_path, weights):
    out = convert(rescaled(True, True), tmp_path / "out", recipe(weights))
    report = verify(out, sources("llama"))
    assert report.findings == ()
    assert {note.code for note in report.notes} == {"columns-rescaled"}
    assert len(report.notes) == 4


def test_columns_that_vanish_beside_larger_ones_tell_no_factor(sources, rescaled, tmp_path):
    out = convert(rescaled(True, True, least=-7), tmp_path / "out", recipe("int4"))
    report = verify(out, sources("llama"))
    assert report.findings == ()
    assert {note.code for note in report.notes} == {"columns-rescaled"}
    columns = convert(rescaled(False, True, least=-7), tmp_path / "columns", recipe("int4"))
    assert verify(columns, sources("llama")).counts == {"columns-unbalanced": 2}


def test_rescaling_that_does_not(sources, rescaled, tmp_path):
    columns = convert(rescaled(False, True), tmp_path / "columns", recipe("int4"))
    assert verify(columns, sources("llama")).counts == {"columns-unbalanced": 2}
    rows = convert(rescaled(True, False), tmp_path / "rows", recipe("int4"))
    assert verify(rows, sources("llama")).counts == {"scale-wrong": 2}


def test_scales_that_clip(good, tmp_path):
    """Codes that are the nearest for scales a quarter as large: right by the letter, clipped."""
    folder, source = good("llama", "int8")
    editor = copy_of(folder, tmp_path / "clipped")
    name = "model.layers.0.self_attn.o_proj"
    weight = load_file(source / "model.safetensors")[f"{name}.weight"]
    scale = editor.tensors[f"{name}.weight_scale"] / 4
    codes = (weight.float() / scale.float()).clamp(-128, 127).round().to(torch.int8)
    editor.tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    found = verify(editor.save(), source).findings
    assert [(f.code, f.tensor) for f in found] == [("scale-clips", f"{name}.weight_scale")]


def test_many_alike_are_named_without_being_tried_one_by_one(good, tmp_path, monkeypatch):
    from ckptq.verify.diagnosis import diagnose

    folder, source = good("qwen3-moe", "int8")
    editor = copy_of(folder, tmp_path / "inverted")
    for name, tensor in editor.tensors.items():
        if name.endswith("weight_scale"):
            editor.tensors[name] = 1 / tensor
    whole = verify(editor.save(), source)
    assert whole.counts.keys() == {"scale-inverted"}
    tried = []
    read = diagnose.read_sample

    def counted(linear, files, undo):
        tried.append(linear.name)
        return read(linear, files, undo)

    monkeypatch.setattr(diagnose, "read_sample", counted)
    monkeypatch.setattr(diagnose, "TRIED", 1)
    assert verify(editor.folder, source).counts == whole.counts
    assert len([name for name in tried if name.endswith("experts.3.up_proj")]) <= 2


@pytest.fixture
def uneven(sources, tmp_path):
    """A source of which k_proj's upper right block is 16 times as large."""
    folder = tmp_path / "uneven"
    shutil.copytree(sources("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][:64, 64:] *= 16
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_transposed_grid_of_scales(uneven, tmp_path):
    out = convert(uneven, tmp_path / "out", recipe("fp8-block"))
    editor = Editor(out)
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    editor.tensors[name] = editor.tensors[name].t()
    found = verify(editor.save(), uneven).findings
    assert [(f.code, f.tensor) for f in found] == [("scale-transposed", name)]


def test_a_format_that_suits_badly_is_noted(sources, tmp_path):
    """One weight of a row far beyond the others: every INT4 code is right, and little is left."""
    folder = tmp_path / "outliers"
    shutil.copytree(sources("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][:, 0] += 1e-2
    tensors["model.layers.0.self_attn.o_proj.weight"][:, 0] *= 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = verify(convert(folder, tmp_path / "out", recipe("int4-channel")), folder)
    assert report.findings == ()
    assert [note.code for note in report.notes] == ["low-snr"]


@pytest.mark.parametrize("weights", ["fp8-channel", "int8", "int4-asym"])
def test_large_weights_need_no_source(sources, tmp_path, weights):
    """As the examples' projections have, which make up for small values: 2350 at most."""
    source = copy_of(sources("llama"), tmp_path / "source")
    name = source.named("layers.1.self_attn.o_proj.weight")
    source.tensors[name] *= 2400 / source.tensors[name].abs().amax(1, keepdim=True)
    folder = convert(source.save(), tmp_path / "out", recipe(weights))
    assert verify(folder).findings == ()


@pytest.mark.parametrize("weights", ["fp8-channel", "fp8-block", "int8", "int4", "int4-asym"])
def test_weights_of_any_size_are_proved_by_their_source(sources, tmp_path, weights):
    """Without it their scales look like memory that nobody wrote to; no calibration mends them."""
    source = copy_of(sources("llama"), tmp_path / "source")
    source.tensors[source.named("o_proj.weight")] *= 1e12
    out = convert(source.save(), tmp_path / "out", recipe(weights))
    assert verify(out, source.folder).findings == ()
    (found,) = verify(out).findings
    assert found.code == "scale-uninitialised"
    assert "--source" in found.repair
    assert "calibrate" not in found.repair


@pytest.mark.parametrize("weights", ["fp8-channel", "fp8-block", "mxfp8", "mxfp4", "nvfp4", "int4"])
def test_rows_of_zeros_are_right_and_rows_without_codes_are_not(sources, tmp_path, weights):
    """Without a source; the scales of zeros are known."""
    source = copy_of(sources("llama"), tmp_path / "source")
    source.tensors[source.named("o_proj.weight")][:70] = 0
    editor = Editor(convert(source.save(), tmp_path / "out", recipe(weights)))
    assert verify(editor.folder).findings == ()
    name = next(n for n in editor.tensors if re.search(r"0.*o_proj\.weight(_packed)?$", n))
    editor.tensors[name].view(torch.uint8)[-70:] = 0
    assert [(f.code, f.tensor) for f in verify(editor.save()).findings] == [("codes-empty", name)]


def test_a_row_of_one_negative_number_is_no_row_without_codes(sources, tmp_path):
    """Its asymmetric codes are all the least, stored as zero bytes; its zero points say so."""
    source = copy_of(sources("llama"), tmp_path / "source")
    source.tensors[source.named("o_proj.weight")][3] = -0.02
    editor = Editor(convert(source.save(), tmp_path / "out", recipe("int4-asym")))
    assert verify(editor.folder).findings == ()
    editor.tensors[editor.named("o_proj.weight_packed")][4] = 0
    assert [f.code for f in verify(editor.save()).findings] == ["codes-empty"]


@pytest.mark.parametrize(("family", "layers"), [("llama4", 1), ("mixtral", 2), ("qwen3-moe", 2)])
def test_experts_with_a_projection_that_was_left(sources, tmp_path, family, layers):
    """Right by the letter, and vLLM refuses it; nothing else is wrong."""
    ignore = (r"re:.*experts.*\.(down_proj|w2)$",)
    out = convert(sources(family), tmp_path / "out", recipe("int4", ignore=ignore))
    report = verify(out, sources(family))
    assert report.counts == {"experts-differ": layers}
    assert "unquantized" in report.findings[0].found


def test_a_suspect_whose_sibling_the_source_lacks(good, tmp_path):
    """What is beside a wrong weight is tried in its place; an extra Linear has no source to try."""
    folder, source = good("llama", "fp8-channel")
    shutil.copytree(source, tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    edit = copy_of(folder, tmp_path / "out")
    gate = edit.tensors["model.layers.1.mlp.gate_proj.weight"]
    edit.tensors["model.layers.1.mlp.gate_proj.weight"] = gate[torch.randperm(len(gate))]
    report = verify(edit.save(), tmp_path / "source")
    assert "model.layers.1.mlp.gate_proj.weight" in {f.tensor for f in report.findings}
    assert "model.layers.1.mlp.up_proj.weight" in {f.tensor for f in report.findings}


def test_what_is_not_finite_needs_no_source(good, tmp_path):
    editor = copy_of(good("llama", "int8")[0], tmp_path / "nan")
    editor.tensors["model.norm.weight"][3] = float("inf")
    found = verify(editor.save()).findings
    assert [(f.code, f.tensor) for f in found] == [("not-finite", "model.norm.weight")]


def test_bits_behind_the_last_code(tmp_path, sources):
    """12 columns of 4 bits leave half a word free."""
    from ckptq.quantize.packing import pack_words
    from ckptq.verify.roundtrip.impossible_codes import _padding

    word = pack_words(torch.zeros(3, 12, dtype=torch.int8), 4)
    assert not _padding(word, 12, 4)
    word[1, 1] |= 1 << 20
    assert _padding(word, 12, 4)
    assert not _padding(word, 16, 4)
    assert _padding(torch.tensor([[0, 0, 1]], dtype=torch.int32), 12, 4)


def test_what_the_source_lacks_too_is_told(good, tmp_path):
    """An output that is all of its source, and a source of which a half download is all."""
    made, source = good("llama", "fp8-channel")
    lacking = "model.layers.1.mlp.up_proj"
    folders = []
    for folder in (made, source):
        editor = copy_of(folder, tmp_path / f"lacking-{len(folders)}")
        for name in [n for n in editor.tensors if n.startswith(lacking + ".")]:
            del editor.tensors[name]
        folders.append(editor.save())
    report = verify(*folders)
    told = [(f.code, f.tensor) for f in report.findings]
    assert told == [("tensor-missing", f"{lacking}.weight")]


def test_scales_per_head_of_latent_attention_are_a_fault(good, tmp_path):
    editor = copy_of(good("llama", "kv", True)[0], tmp_path / "latent")
    for name in list(editor.tensors):
        if ".k_proj." in name:
            latent = name.replace("k_proj", "kv_b_proj")
            editor.tensors[latent] = editor.tensors.pop(name)
    editor.config |= {"model_type": "latent", "architectures": ["LatentForCausalLM"]}
    report = verify(editor.save())
    assert report.counts == {"latent-per-head": 2}


def test_layers_that_share_a_cache_need_the_scales_of_its_owner(good, tmp_path):
    """As Gemma-3n's last layers: vLLM fills 1.0, and reads the shared cache with it."""
    editor = copy_of(good("llama", "kv", True)[0], tmp_path / "shared")
    own, owner = "model.layers.1.self_attn", "model.layers.0.self_attn"
    for which in "kv":
        del editor.tensors[f"{own}.{which}_scale"]
    assert verify(editor.save()).counts == {"kv-scale-missing": 2}
    editor.config["num_kv_shared_layers"] = 1
    report = verify(editor.save())
    assert report.counts == {"kv-scale-missing": 2}
    assert {f.wanted for f in report.findings} == {f"{owner}.{which}_scale" for which in "kv"}
    for which in "kv":
        editor.tensors[f"{own}.{which}_scale"] = editor.tensors[f"{owner}.{which}_scale"].clone()
    assert verify(editor.save()).findings == ()
    editor.tensors[f"{own}.v_scale"] *= 2
    assert verify(editor.save()).counts == {"shared-cache-scale": 1}


def test_a_block_format_of_one_block_has_no_shared_scale(sources, tmp_path):
    """A grid of one block is no scale per tensor: gate and up each have their own."""
    wide = recipe("fp8-block")
    group = wide.groups[0]
    args = replace(group.weights, block_structure=(256, 128))
    wide = replace(wide, groups=(replace(group, weights=args),), ignore=("re:.*self_attn",))
    wide = spelled_out(wide)
    report = verify(convert(sources("llama"), tmp_path / "out", wide), sources("llama"))
    assert report.findings == report.notes == ()
