"""Whole shards, whole sources and rescaled rows: what many tensors tell together."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from verify_checkpoints import convert, copy_of, recipe, save_source

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

    def make(rows: bool, columns: bool):
        folder = tmp_path / f"rescaled-{rows}-{columns}"
        shutil.copytree(sources("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        factor = 2.0 ** torch.randint(-1, 2, (256,), generator=torch.Generator().manual_seed(0))
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
    from ckptq.verify import diagnose

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
