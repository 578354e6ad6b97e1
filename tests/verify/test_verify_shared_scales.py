"""`--rope-proof`: scales that rows share are right, and no cover for scales that are wrong."""

from __future__ import annotations

import pytest
import torch
from verify_checkpoints import HEAD_DIM, convert, copy_of, recipe

from ckptq.permute.order import Sharing
from ckptq.verify.run import verify

PROJECTIONS = 4
"""q and k of two layers."""


@pytest.fixture(scope="module", params=Sharing)
def proof(request, sources, tmp_path_factory):
    """INT8 with shared scales, and the source. Its rows differ in size, so that sharing costs."""
    source = copy_of(sources("llama4"), tmp_path_factory.mktemp("proof") / "source")
    generator = torch.Generator().manual_seed(3)
    for name, weight in source.tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight *= torch.randn(len(weight), 1, generator=generator).mul(0.25).exp()
    source.save()
    out = tmp_path_factory.mktemp("proof") / request.param
    return convert(source.folder, out, recipe("int8"), rope_proof=request.param), source.folder


def test_shared_scales_are_right(proof):
    folder, source = proof
    report = verify(folder, source, engine="vllm")
    assert report.findings == ()
    assert [note.code for note in report.notes] == ["scale-shared"] * PROJECTIONS
    assert all(t.codes_wrong == t.scales_wrong == 0 for t in report.tensors)


def test_an_engine_that_permutes_weights_alone_computes_the_same(proof, good):
    """vLLM before PR 34243; the same format without shared scales arrives wrong."""
    folder, source = proof
    assert verify(folder, source, engine="vllm-0.15").findings == ()
    own, source = good("llama4", "int8")
    assert verify(own, source, engine="vllm-0.15").counts == {"arrives-wrong": PROJECTIONS}


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
