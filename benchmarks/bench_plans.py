"""Plans of the largest published models, by headers alone: seconds and peak memory, as one table.

    python benchmarks/bench_plans.py

`ckptq quantize --dry-run` of sources that are all holes (benchmarks/giants.py).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from giants import MODELS, make
from measure import load, machine, run
from record import Row, add_option, publish

CODE = ("ckptq/checkpoint", "ckptq/models", "ckptq/plan")
SCHEMES = ("w4a16", "repack", "dequantize")
REFUSED = {("gpt-oss-120b", "repack")}
"""vLLM serves its experts as they are."""


def rows(work: Path) -> list[Row]:
    made: list[Row] = []
    dry_run = [sys.executable, "-m", "ckptq", "quantize", "--dry-run"]
    for model in MODELS:
        source = work / model
        tensors, nbytes = make(source, MODELS[model])
        for scheme in SCHEMES:
            if (model, scheme) in REFUSED:
                continue
            took = run([*dry_run, source, "-s", scheme])
            made.append(
                {
                    "plan": f"{model}, {scheme}",
                    "tensors": tensors,
                    "GB": nbytes / 1e9,
                    "seconds": took.seconds,
                    "CPU seconds": took.cpu_seconds,
                    "peak MB": took.peak_bytes / 1e6,
                }
            )
            print(f"{model} {scheme}: {took.seconds:.1f} s, load {load():.1f}", file=sys.stderr)
        shutil.rmtree(source)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where sources lie; default: a temporary folder")
    add_option(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        found = rows(Path(folder))
    what = "Plans by headers (`quantize --dry-run`)"
    publish("plans", what, found, code=CODE, machine=machine(), folder=given.record)


if __name__ == "__main__":
    main()
