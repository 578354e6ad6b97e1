"""What the attention and KV-cache kernels compile to: tensor cores, and exact arithmetic."""

import re

import pytest
from test_builds import built, ptx_of

pytestmark = pytest.mark.xdist_group("builds")

WGMMA = "wgmma.mma_async.sync.aligned"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_rotating_and_quantizing_is_exact(capability: int) -> None:
    """No approximate division or root but the first guesses of INT4 and INT2, nothing flushed, and
    fused only where INT4 and INT2 say so."""
    lifted = ptx_of(capability, "_write_lifted")
    guess = r"\b(?:rcp|rsqrt)\.approx\.ftz\.f32"
    assert re.search(guess, lifted)
    plain = [ptx_of(capability, name) for name in ("_write_token_head", "_rotate", "_write_cache")]
    for ptx in (re.sub(guess, "", lifted), *plain):
        assert ptx
        for inexact in (".approx", "div.full", ".ftz"):
            assert inexact not in ptx, f"{inexact} on sm_{capability}"
    assert not any("fma." in ptx for ptx in plain)
    assert "fma.rn.f16x2" in lifted


def test_attention_uses_the_tensor_cores_of_its_target() -> None:
    hopper, ampere = ptx_of(90, "_attention"), ptx_of(80, "_attention")
    assert re.search(WGMMA + r"\.m64n\d+k16\.f32\.bf16\.bf16", hopper)
    assert re.search(WGMMA + r"\.m64n\d+k32\.f32\.e4m3\.e4m3", hopper)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16" in ampere
    assert "e4m3" not in ampere
    assert "tcgen05.mma" in ptx_of(100, "_attention")
    assert WGMMA + ".m64n128k16.f32.f16.f16" in ptx_of(90, "_write_lifted")
    warp = "mma.sync.aligned.m16n8k16.row.col.f32."
    assert warp + "bf16.bf16" in ptx_of(90, "_paged_attention")
    assert warp + "f16.f16" in ptx_of(90, "_token_head_attention")


def test_maxima_are_recorded_by_one_integer_operation_each() -> None:
    """One variant of the five records; its q, k and v are a reduction each."""
    recorded = [
        len(re.findall(r"(?:atom|red)\.\S*max\.s32", ptx))
        for ptx in built(90)["_attention_kernel"]["ptx"]
    ]
    assert sorted(recorded) == [0, 0, 0, 0, 3]
