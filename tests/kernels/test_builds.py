"""Every kernel compiles to machine code for Ampere, Hopper and Blackwell, on a machine without any.

In a process of its own: the interpreter and the compiler cannot share one.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from build_all import SHARED_MEMORY

HERE = Path(__file__).parent
WGMMA = "wgmma.mma_async.sync.aligned"


@cache
def built(capability: int) -> dict[str, dict[str, list]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    command = [sys.executable, str(HERE / "build_all.py"), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def ptx_of(capability: int, prefix: str) -> str:
    """The PTX of all variants of the kernels whose names start so."""
    found = built(capability)
    return "".join(ptx for k, v in found.items() if k.startswith(prefix) for ptx in v["ptx"])


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_builds(capability: int) -> None:
    kernels = built(capability)
    assert len(kernels) >= 10
    assert not [name for name, kernel in kernels.items() if not kernel.get("cubin")]
    assert all(min(kernel["cubin"]) > 1000 for kernel in kernels.values())


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_kernel_asks_for_more_shared_memory_than_there_is(capability: int) -> None:
    """It would compile, and fail when it is launched. The most that any asks for is not little."""
    asked = {name: max(kernel["shared"]) for name, kernel in built(capability).items()}
    room = SHARED_MEMORY[capability]
    assert {name: most for name, most in asked.items() if most > room} == {}
    assert max(asked.values()) > room // 2


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_quantize_kernels_divide_and_round_exactly(capability: int) -> None:
    """No approximate division, nothing flushed to zero."""
    for prefix in ("_quantize", "_dequantize", "_error_sums"):
        ptx = ptx_of(capability, prefix)
        assert ptx
        for inexact in ("div.full", "div.approx", "rcp.approx", ".ftz"):
            assert inexact not in ptx, f"{prefix} on sm_{capability} uses {inexact}"


def test_the_fp8_units_are_used_where_there_are_any() -> None:
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx_of(90, "_quantize_rows")
    assert "e4m3" not in ptx_of(80, "_quantize_rows")
    assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in ptx_of(90, "_linear_w8a8")
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in ptx_of(90, "_linear_w8a8")


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
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16" in ampere
    assert "tcgen05.mma" in ptx_of(100, "_attention")
    assert WGMMA + ".m64n128k16.f32.f16.f16" in ptx_of(90, "_write_lifted")
    warp = "mma.sync.aligned.m16n8k16.row.col.f32."
    assert warp + "bf16.bf16" in ptx_of(90, "_paged_attention")
    assert warp + "f16.f16" in ptx_of(90, "_token_head_attention")


def test_maxima_are_recorded_by_one_integer_operation_each() -> None:
    """One variant of the four records; its q, k and v are a reduction each."""
    recorded = [
        len(re.findall(r"(?:atom|red)\.\S*max\.s32", ptx))
        for ptx in built(90)["_attention_kernel"]["ptx"]
    ]
    assert sorted(recorded) == [0, 0, 0, 3]
