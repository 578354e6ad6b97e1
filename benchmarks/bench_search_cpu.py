"""Searching the ranges of one weight: ckptq beside llm-compressor's observer, in one process.

    python benchmarks/bench_search_cpu.py [--rows 1024] [--columns 4096] [--threads 1]

Both search the same bf16 weight, ckptq in blocks as `ckptq quantize` does, in turns; of each the
best of several turns counts, in CPU time of the process, so that neighbours cost little. Both
end with the same ranges, but where the observer stops early; the share that is equal is shown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.observers.base import Observer
from measure import machine
from record import Row, add_option, publish
from torch import Tensor

from ckptq.quantize.scratch import Scratch
from ckptq.quantize.search import best_ranges
from ckptq.quantize.tiles import tiled
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.args import Args
from ckptq.recipes.load import load_scheme

CODE = ("ckptq/quantize/search.py",)
SCHEMES = ("fp8-dynamic", "fp8-block", "w8a8", "w4a16", "w4a16-g32", "w4a16-asym", "mxfp4a16")
SLOW = ("nvfp4a16",)
BLOCK = 1 << 19


def observer(scheme: WeightScheme, args: Args) -> Any:
    """The one that the recipe names, with its arguments."""
    given = QuantizationArgs(
        num_bits=scheme.num_bits,
        type=scheme.type,
        strategy=scheme.strategy,
        symmetric=scheme.symmetric,
        group_size=scheme.group_size,
        block_structure=scheme.block_structure,
        scale_dtype=getattr(torch, scheme.scale_dtype) if scheme.scale_dtype else None,
        observer=args.observer,
        observer_kwargs=args.observer_kwargs or {},
    )
    return Observer.load_from_registry(given.observer, base_name="weight", args=given)


def seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def measured(name: str, w_RC: Tensor, turns: int) -> Row:
    (group,) = load_scheme(f"{name}-search").groups
    scheme = group.weight_scheme()
    assert group.weights is not None
    assert scheme.search is not None
    x, scratch = tiled(w_RC, scheme), Scratch(block_elements=BLOCK)
    found = observer(scheme, group.weights)
    # [1, tiles of rows, tiles of columns, weights of a tile], as it sees them itself
    seen = x[None] if x.ndim == 3 else x.transpose(1, 2).flatten(-2)[None]
    ours, theirs = [], []
    for _ in range(turns):
        ours.append(seconds(lambda: best_ranges(x, scheme, scheme.search, scratch)))
        theirs.append(seconds(lambda: found.update_statistics_from_observed(seen)))
    _, high = best_ranges(x, scheme, scheme.search, scratch)
    same = high == found.max_vals.clamp(min=0)
    return {
        "scheme": name,
        "ns a weight": min(ours) / w_RC.numel() * 1e9,
        "observer's": min(theirs) / w_RC.numel() * 1e9,
        "x": min(theirs) / min(ours),
        "equal %": 100 * same.float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    add_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    w_RC = (torch.randn(given.rows, given.columns, generator=generator) * 0.02).bfloat16()
    rows = []
    for name in (*SCHEMES, *SLOW):
        rows.append(measured(name, w_RC if name not in SLOW else w_RC[:64], given.turns))
        print(rows[-1], flush=True)
    what = f"Search of ranges, {given.rows} x {given.columns} bf16, {given.threads} thread"
    publish("search-cpu", what, rows, code=CODE, machine=machine(), folder=given.record)


if __name__ == "__main__":
    main()
