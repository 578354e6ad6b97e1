"""Layers that predict further tokens: never quantized anew, and never left in the codes of another
format, whose scales no reader of the result would find."""

import json
from pathlib import Path

import pytest
import torch
from convert_cases import convert
from families.hub import BLOCK, FP8_CONFIG, in_fp8_blocks
from families.sources import save, save_variant
from tiny.tensors import tensors_in

from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

FAMILIES = {"deepseek_v3_mtp": "model.layers.4.", "qwen3_next_mtp": "mtp."}
"""Family -> what the names of such a layer begin with."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(family, whether in FP8 blocks, those layers too) -> its folder."""
    root = tmp_path_factory.mktemp("mtp")

    def made(family: str, quantized: bool) -> Path:
        plain, out = save(family, root), root / f"{family}_fp8"
        if quantized and not out.exists():
            save_variant(plain, out, in_fp8_blocks, {"quantization_config": FP8_CONFIG})
        return out if quantized else plain

    return made


def inside(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors_in(folder).items() if name.startswith(prefix)}


def ignored(folder: Path) -> list[str]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_quantized_is_copied_byte_for_byte(sources, tmp_path, family):
    source, prefix = sources(family, False), FAMILIES[family]
    out = convert(source, tmp_path / "out", load_scheme("fp8-dynamic")).out
    theirs, ours = inside(source, prefix), inside(out, prefix)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[n], ours[n]) for n in theirs)
    assert any(name.startswith(prefix) for name in ignored(out))


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "repack"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_quantized_is_decoded(sources, tmp_path, family, scheme):
    source, prefix = sources(family, True), FAMILIES[family]
    out = convert(source, tmp_path / "out", load_scheme(scheme)).out
    theirs, ours = inside(source, prefix), inside(out, prefix)
    coded = [name for name in theirs if name.endswith("_scale_inv")]
    assert coded
    assert ours.keys() == theirs.keys() - set(coded)
    for scale in coded:
        name = scale.removesuffix("_scale_inv")
        R, C = theirs[name].shape
        wide = theirs[scale].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:R, :C]
        assert torch.equal(ours[name], (theirs[name].float() * wide).bfloat16())
    assert any(name.startswith(prefix) for name in ignored(out))
    assert verify(out, source).findings == ()
