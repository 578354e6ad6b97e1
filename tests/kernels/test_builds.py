"""Every kernel compiles to machine code for Ampere, Hopper and Blackwell, on a machine without any.

In a process of its own: the interpreter and the compiler cannot share one.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from build_all import SHARED_MEMORY

HERE = Path(__file__).parent

pytestmark = pytest.mark.xdist_group("builds")  # what is compiled once serves all tests


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
    for prefix in ("_quantize", "_dequantize"):
        ptx = ptx_of(capability, prefix)
        assert ptx
        for inexact in ("div.full", "div.approx", "rcp.approx", ".ftz"):
            assert inexact not in ptx, f"{prefix} on sm_{capability} uses {inexact}"


def test_the_fp8_units_are_used_where_there_are_any() -> None:
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx_of(90, "_quantize_rows")
    assert "e4m3" not in ptx_of(80, "_quantize_rows")
    assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in ptx_of(90, "_linear_w8a8")
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in ptx_of(90, "_linear_w8a8")
