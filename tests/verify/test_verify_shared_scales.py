"""`--rope-proof`: scales that rows share are right, and no cover for scales that are wrong."""

from __future__ import annotations

import pytest
import torch
from verify_checkpoints import HEAD_DIM, Editor, convert, copy_of, recipe

from ckptq.permute.order import Sharing
from ckptq.verify.run import verify

PROJECTIONS = 4
"""q and k of two layers."""


@pytest.fixture(scope="module")
def uneven(sources, tmp_path_factory):
    """A source whose rows differ in size, so that sharing costs; its heads hardly do."""
    source = copy_of(sources("llama4"), tmp_path_factory.mktemp("proof") / "source")
    generator = torch.Generator().manual_seed(3)
    for name, weight in source.tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight *= torch.randn(len(weight), 1, generator=generator).mul(0.25).exp()
    return source.save()


@pytest.fixture(scope="module", params=Sharing)
def proof(request, uneven, tmp_path_factory):
    """INT8 with shared scales, and the source."""
    out = tmp_path_factory.mktemp("proof") / request.param
    return convert(uneven, out, recipe("int8"), rope_proof=request.param), uneven


def test_shared_scales_are_right(proof):
    folder, source = proof
    report = verify(folder, source, engine="vllm")
    assert report.findings == ()
    assert [note.code for note in report.notes] == ["scale-shared"] * PROJECTIONS
    assert all(t.codes_wrong == t.scales_wrong == 0 for t in report.tensors)


@pytest.mark.parametrize("fast", [False, True])
def test_one_wrong_scale_of_a_shared_one_is_a_fault(proof, tmp_path, fast):
    folder, source = proof
    broken = copy_of(folder, tmp_path / "broken")
    broken.tensors[broken.named("layers.0.self_attn.k_proj.weight_scale")][5] *= 3
    report = verify(broken.save(), source, fast=fast)
    assert len(report.findings) == 1
    assert "layers.0.self_attn.k_proj" in report.findings[0].tensor


def test_heads_that_exchange_their_shared_scales_are_a_fault(proof, tmp_path):
    """Every scale is still one that rows share."""
    folder, source = proof
    broken = copy_of(folder, tmp_path / "broken")
    name = broken.named("layers.1.self_attn.k_proj.weight_scale")
    broken.tensors[name] = broken.tensors[name].roll(HEAD_DIM, 0)
    report = verify(broken.save(), source)
    assert [finding.code for finding in report.findings] == ["heads-swapped"]


def test_rows_of_other_projections_share_nothing(proof, tmp_path):
    """o_proj's scales, raised as if its rows were heads': not what the converter makes of it."""
    folder, source = proof
    broken = copy_of(folder, tmp_path / "broken")
    scale = broken.tensors[broken.named("layers.0.self_attn.o_proj.weight_scale")]
    scale.copy_(
        scale.unflatten(0, (-1, HEAD_DIM)).amax(1, True).expand(-1, HEAD_DIM, 1).flatten(0, 1)
    )
    assert len(verify(broken.save(), source).findings) == 1


@pytest.mark.parametrize("weights", ["fp8-channel", "int8", "int4-channel"])
@pytest.mark.parametrize("fast", [False, True])
def test_heads_of_like_size_that_exchange_their_scales_are_a_fault(uneven, tmp_path, weights, fast):
    """Every head still has one scale for all of its rows."""
    out = convert(uneven, tmp_path / "out", recipe(weights), rope_proof=Sharing.HEAD)
    broken = Editor(out)
    name = broken.named("layers.0.self_attn.k_proj.weight_scale")
    first, second = broken.tensors[name].float().unflatten(0, (-1, HEAD_DIM))[:, 0, 0].tolist()
    assert 1.05 < max(first / second, second / first) < 1.3
    broken.tensors[name] = broken.tensors[name].roll(HEAD_DIM, 0)
    (found,) = verify(broken.save(), uneven, fast=fast).findings
    assert (found.code, found.tensor) in {("scale-wrong", name), ("heads-swapped", name)}


@pytest.mark.parametrize("weights", ["fp8-channel", "int8"])
@pytest.mark.parametrize("fast", [False, True])
def test_shared_scales_that_are_off_by_a_little_are_a_fault(uneven, tmp_path, weights, fast):
    """The codes say which scales they were made with, though the weights come out well enough."""
    out = convert(uneven, tmp_path / "out", recipe(weights), rope_proof=Sharing.HEAD)
    broken = Editor(out)
    name = broken.named("layers.0.self_attn.k_proj.weight_scale")
    broken.tensors[name] *= 1.02
    (found,) = verify(broken.save(), uneven, fast=fast).findings
    assert (found.code, found.tensor) == ("scale-wrong", name)


def test_one_wrong_scale_of_shared_ones_is_damage(uneven, tmp_path):
    """Nothing was exchanged, though moving it to a smaller row would cost less."""
    for sharing in Sharing:
        broken = Editor(convert(uneven, tmp_path / sharing, recipe("int8"), rope_proof=sharing))
        name = broken.named("layers.0.self_attn.k_proj.weight_scale")
        broken.tensors[name][5] *= 1.5
        found = verify(broken.save(), uneven).findings
        assert [(f.code, f.tensor) for f in found] == [("scale-corrupt", name)]
