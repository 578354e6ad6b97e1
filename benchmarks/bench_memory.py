"""Peak memory of a conversion to FP8, over size and shape, as one table.

    python benchmarks/bench_memory.py

Sources are sparse files of the models' real shapes, and zeros are left as holes in the output, so
that 141 GB need no disk; everything else runs as it always does. Each line says how the peak
compares with the promise: 1 GB and three times the largest unit, for any number of layers.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from measure import machine, run
from record import Row, add_option, publish

HERE = Path(__file__).parent
CODE = ("ckptq/checkpoint", "ckptq/convert", "ckptq/quantize")

HOLES = """
import os, sys
import numpy
from ckptq.__main__ import main

pwrite, copy_file_range = os.pwrite, os.copy_file_range

def pwrite_data(target, data, at):
    if len(data) < 4096 or numpy.frombuffer(data, numpy.uint8).any():
        return pwrite(target, data, at)
    return len(data)

def copy_data(source, target, count, offset, at):
    try:
        begins = os.lseek(source, offset, os.SEEK_DATA)
    except OSError:
        begins = offset + count
    return count if begins >= offset + count else copy_file_range(source, target, count, offset, at)

os.pwrite, os.copy_file_range = pwrite_data, copy_data
sys.argv[0] = "ckptq"
main()
"""
"""Both are files of the full size from the start, so that what is not written reads as zeros."""

CASES: list[tuple[str, int | None, str]] = [
    *(("llama-8b", layers, "fp8-dynamic") for layers in (1, 3, 8, 17)),
    ("llama-70b", None, "fp8-dynamic"),
    ("llama4-maverick", None, "fp8-dynamic"),
]
"""(shapes, layers, scheme)"""

UNIT_BYTES = {"llama4-maverick": 2 * 5120 * 2 * 8192}
"""The largest unit, where it is held whole: gate and up of one expert."""


def peak(work: Path, shapes: str, layers: int | None, scheme: str) -> Row:
    """One line of the table."""
    source, out = work / "source", work / "out"
    depth = [] if layers is None else ["--layers", str(layers)]
    script = [sys.executable, HERE / "make_synthetic.py", source, "--shapes", shapes, "--sparse"]
    run([*script, *depth])
    nbytes = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    shards = len(list(source.glob("*.safetensors")))
    took = run([sys.executable, "-c", HOLES, "quantize", source, "-o", out, "-s", scheme])
    shutil.rmtree(source)
    shutil.rmtree(out)
    unit = UNIT_BYTES.get(shapes, 0)
    ceiling = 10**9 + 3 * unit
    print(f"{shapes} {nbytes / 1e9:.1f} GB: {took.peak_bytes / 1e6:.0f} MB", file=sys.stderr)
    return {
        "source": f"{shapes}, {nbytes / 1e9:.1f} GB",
        "files": shards,
        "held whole MB": unit / 1e6,
        "peak MB": took.peak_bytes / 1e6,
        "promised MB": ceiling / 1e6,
        "seconds": took.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default="work", help="a folder on a disk, some MB")
    parser.add_argument("--only", help="shapes of this name alone, e.g. llama-70b")
    add_option(parser)
    given = parser.parse_args()
    work = given.work / "bench-memory"
    work.mkdir(parents=True)
    try:
        rows = [peak(work, *case) for case in CASES if given.only in (None, case[0])]
    finally:
        shutil.rmtree(work)
    what = "Peak memory of a conversion to fp8-dynamic"
    name = "convert-memory" if given.only is None else f"convert-memory-{given.only}"
    publish(name, what, rows, code=CODE, machine=machine(), folder=given.record)


if __name__ == "__main__":
    main()
