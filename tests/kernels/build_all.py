"""Compile every kernel for one GPU that need not be there, and print what came of it as JSON.

`python tests/kernels/build_all.py 90`, in a process of its own, without TRITON_INTERPRET: a launch
compiles for that target, to machine code, and stops there. The launchers run on CPU tensors; their
results are poison. Every module `launches_*.py` in this folder lists launches.

Output: {kernel: {"ptx": [PTX of each variant], "cubin": [bytes of each], "shared": [bytes of shared
memory that each asks for]}}
"""

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import ckptq.kernels
from ckptq.kernels import gpu, rounding

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a program may have, by capability: CUDA C++ Programming Guide, technical
specifications."""

MOST = {80: 1, 90: 100, 100: 1}
"""Variants of each kernel that are compiled: all for Hopper, the first for the others."""


class NoDevice:
    """What `triton.jit` asks of a driver before it launches anything."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compiled_kernels(capability: int) -> dict[str, dict[str, list[Any]]]:
    driver.set_active(NoDevice(capability))
    # before any launcher's module takes it by name
    rounding.has_native_e4m3 = lambda _device: capability >= 89
    gpu.shared_memory = lambda _device: SHARED_MEMORY[capability]
    built: dict[str, dict[str, list[Any]]] = {}
    run = JITFunction.run

    def build(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        found = built.setdefault(kernel.fn.__name__, {"ptx": [], "cubin": [], "shared": []})
        if len(found["ptx"]) == MOST[capability]:
            return
        compiled = run(kernel, *args, **kwargs | {"warmup": True})
        found["ptx"].append(compiled.asm["ptx"])
        found["cubin"].append(len(compiled.asm["cubin"]))
        found["shared"].append(compiled.metadata.shared)

    JITFunction.run = build
    for path in sorted(Path(__file__).parent.glob("launches_*.py")):
        importlib.import_module(path.stem).launch_all(torch.device("cpu"))
    return built


def kernel_names() -> set[str]:
    """Every kernel there is: the jitted functions called `*_kernel` in the package."""
    names = set()
    for module in pkgutil.walk_packages(ckptq.kernels.__path__, "ckptq.kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel"):
                names.add(value.fn.__name__)
    return names


if __name__ == "__main__":
    built = compiled_kernels(int(sys.argv[1]))
    print(json.dumps({name: {} for name in kernel_names()} | built))
