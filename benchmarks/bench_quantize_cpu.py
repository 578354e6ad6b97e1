"""How fast one CPU core turns bf16 weights into each format, against copying them.

    python benchmarks/bench_quantize_cpu.py            # GB of bf16 source a second and core
    python benchmarks/bench_quantize_cpu.py --blocks   # the same over block sizes
    python benchmarks/bench_quantize_cpu.py --threads 2

Every thread quantizes a matrix of its own, a million elements a call, as `ckptq quantize` does.
Timed is the CPU time of the thread, the best of several rounds, so that a neighbour costs little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from measure import machine
from record import Row, add_option, publish
from torch import Tensor

from ckptq.quantize import scratch
from ckptq.quantize.formats import Scratch, WeightScheme, needs_statistic, quantize, statistic
from ckptq.recipes.args import Args

CODE = ("ckptq/quantize",)
R, C = 2048, 4096  # 16 MB of bf16: not in a core's own cache
CALL_ROWS = 256
ROUNDS = 7
BLOCKS = tuple(1 << n for n in range(15, 21))

MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "uint8"}
NV = {"type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "float8_e4m3fn"}
INT4 = {"num_bits": 4, "strategy": "group"}
E4M3 = {"num_bits": 8, "type": "float"}

SCHEMES = [
    Args.read(args).weight_scheme(format)
    for format, args in (
        ("float-quantized", {**E4M3, "strategy": "channel"}),
        ("float-quantized", {**E4M3, "strategy": "tensor"}),
        ("float-quantized", {**E4M3, "strategy": "block", "block_structure": [128, 128]}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 128}),
        ("pack-quantized", {**INT4, "group_size": 128}),
        ("pack-quantized", {**INT4, "group_size": 128, "symmetric": False}),
        ("pack-quantized", {**INT4, "group_size": 32}),
        ("mxfp8-quantized", {"num_bits": 8, **MX}),
        ("mxfp4-pack-quantized", {"num_bits": 4, **MX}),
        ("nvfp4-pack-quantized", {"num_bits": 4, **NV}),
    )
]


def gb_per_s(work: Callable[[Tensor], object], w_RC: Tensor) -> float:
    """Source bytes over CPU seconds of `work` on all rows, in the best round."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for rows in w_RC.split(CALL_ROWS):
            work(rows)
        seconds.append(time.thread_time() - start)
    return w_RC.nbytes / min(seconds) / 1e9


def quantizer(scheme: WeightScheme, w_RC: Tensor) -> Callable[[Tensor], object]:
    found = statistic(w_RC) if needs_statistic(scheme) else None
    held = Scratch()
    return lambda rows: quantize(rows, scheme, found, held)


def copier() -> Callable[[Tensor], object]:
    target = torch.empty(CALL_ROWS, C, dtype=torch.bfloat16)
    return lambda rows: target.copy_(rows)


def speed(make: Callable[[Tensor], Callable[[Tensor], object]], threads: int) -> float:
    """GB/s of one thread, the slowest of `threads` that run at once."""

    def alone(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        w_RC = (torch.randn(R, C, generator=generator) * 0.02).bfloat16()
        return gb_per_s(make(w_RC), w_RC)

    with ThreadPoolExecutor(threads) as pool:
        return min(pool.map(alone, range(threads)))


def main() -> None:
    parser = argparse.ArgumentParser(description="GB of bf16 source a second and core")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", action="store_true", help="over block sizes")
    add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = BLOCKS if options.blocks else (scratch.BLOCK_ELEMENTS,)
    makers = {"copy": lambda _: copier(), "statistic": lambda _: statistic}
    makers |= {str(scheme): partial(quantizer, scheme) for scheme in SCHEMES}
    rows: list[Row] = []
    for name, make in makers.items():
        row: dict[str, str | float] = {"GB/s": name}
        for size in sizes:
            scratch.BLOCK_ELEMENTS = size
            row[f"{size >> 10}K"] = speed(make, options.threads)
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    what = "GB of bf16 source a second and core, over elements a block"
    publish("quantize-cpu", what, rows, code=CODE, machine=machine(), folder=options.record)


if __name__ == "__main__":
    main()
