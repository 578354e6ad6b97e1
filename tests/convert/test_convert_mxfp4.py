"""gpt-oss: experts in MXFP4 blocks are dequantized as transformers does it, and stay one tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert_cases import convert
from safetensors.torch import load_file, save_file
from tiny.foreign import Foreign, gpt_oss
from tiny.tensors import differences, tensors_in
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ckptq.checkpoint.open import open_checkpoint
from ckptq.checkpoint.read import Files
from ckptq.errors import SourceError
from ckptq.forward.decoded import weights_of
from ckptq.models.encoded import read_encoded
from ckptq.models.weight_rows import weight_rows
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify


@pytest.fixture
def source(tmp_path: Path) -> Foreign:
    return gpt_oss(tmp_path / "source")


def unquantized(foreign: Foreign, folder: Path) -> Path:
    parts = {f"{name}_{part}" for name in foreign.weights for part in ("blocks", "scales")}
    plain = {n: t for n, t in foreign.stored.items() if n not in parts} | foreign.weights
    folder.mkdir()
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((foreign.folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_are_what_transformers_makes_of_them(source: Foreign) -> None:
    encoded = read_encoded(open_checkpoint(source.folder))
    assert encoded.keys() == source.weights.keys()
    with Files() as files:
        for name, weight in encoded.items():
            blocks, scales = (source.stored[f"{name}_{part}"] for part in ("blocks", "scales"))
            expected = convert_moe_packed_tensors(blocks, scales)
            rows = weight_rows(files, weight)
            whole = rows(0, weight.spec.shape[0]).view(weight.written.shape)
            assert torch.equal(whole, expected), name
            assert torch.equal(rows(weight.quantum, 2 * weight.quantum), expected[1])


@pytest.mark.parametrize("exponent", [0, 1, 60, 126, 127, 128, 200, 254])
def test_every_exponent_is_a_power_of_two(tmp_path: Path, exponent: int) -> None:
    source = gpt_oss(tmp_path / "source")
    name = next(iter(source.weights))
    scales = torch.full_like(source.stored[f"{name}_scales"], exponent)
    save_file(source.stored | {f"{name}_scales": scales}, source.folder / "model.safetensors")
    weight = read_encoded(open_checkpoint(source.folder))[name]
    with Files() as files:
        whole = weight_rows(files, weight)(0, weight.spec.shape[0])
    expected = convert_moe_packed_tensors(
        source.stored[f"{name}_blocks"], scales, dtype=torch.float64
    )
    assert torch.equal(whole.view(weight.written.shape), expected.bfloat16())


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "w4a16-g32"])
def test_the_rest_is_quantized_as_in_the_unquantized_model(
    source: Foreign, tmp_path: Path, scheme: str
) -> None:
    plain = unquantized(source, tmp_path / "plain")
    out = convert(source.folder, tmp_path / "out", load_scheme(scheme)).out
    expected = convert(plain, tmp_path / "expected", load_scheme(scheme)).out
    assert differences(tensors_in(out), tensors_in(expected)) == []
    configs = [json.loads((o / "config.json").read_text()) for o in (out, expected)]
    assert configs[0] == configs[1]
    assert verify(out, source.folder).ok
    assert verify(out, plain).ok


def test_a_forward_pass_is_given_the_same_weights(source: Foreign, tmp_path: Path) -> None:
    plain = open_checkpoint(unquantized(source, tmp_path / "plain"))
    given = weights_of(open_checkpoint(source.folder))
    assert set(given.names()) == plain.tensors.keys()
    for name, tensor in given.load(list(source.weights)).items():
        assert torch.equal(tensor, source.weights[name])


def converted(source: Foreign, folder: Path) -> Path:
    """In one file."""
    fp8 = load_scheme("fp8-dynamic")
    return convert(source.folder, folder / "out", fp8, shard_bytes=1 << 30).out


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_an_expert_of_another_source_is_noticed(source: Foreign, tmp_path: Path, part: str) -> None:
    out = convert(
        source.folder, tmp_path / "out", load_scheme("fp8-dynamic"), shard_bytes=1 << 30
    ).out
    name = "model.layers.1.mlp.experts.down_proj"
    stored = load_file(source.folder / "model.safetensors")
    stored[f"{name}_{part}"][2, 5, 1] ^= 1
    save_file(stored, source.folder / "model.safetensors", metadata={"format": "pt"})
    faults = [f for f in verify(out, source.folder).findings if f.severity == "fault"]
    assert [(f.code, f.tensor) for f in faults] == [("copy-differs", name)]


def test_an_output_without_a_layer_s_experts_is_noticed(source: Foreign, tmp_path: Path) -> None:
    out = convert(
        source.folder, tmp_path / "out", load_scheme("fp8-dynamic"), shard_bytes=1 << 30
    ).out
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(out / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    faults = {(f.code, f.tensor) for f in verify(out, source.folder).findings}
    assert ("tensor-missing", name) in faults


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", None, "found .*_blocks but no .*_scales"),
        ("scales", lambda t: t[:, :, :1].contiguous(), r"expected U8 \[4, 192, 2\]"),
        ("scales", lambda t: t.to(torch.int8), "expected U8"),
        ("blocks", lambda t: t.flatten(2), r"expected U8 \[E, O, G, 16\]"),
        ("blocks", lambda t: t.to(torch.int8), "expected U8"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    source: Foreign, part: str, change: object, message: str
) -> None:
    name = f"model.layers.0.mlp.experts.gate_up_proj_{part}"
    stored = dict(source.stored)
    if callable(change):
        stored[name] = change(stored[name])
    else:
        stored.pop(name)
    save_file(stored, source.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=message):
        make_plan(open_checkpoint(source.folder), load_scheme("fp8-dynamic"))
