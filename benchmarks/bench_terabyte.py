"""DeepSeek-V3, 671 GB in FP8: its plan, and the conversion of as much of it as a disk holds.

    python benchmarks/bench_terabyte.py --work FOLDER [--experts 16 96] [--device cuda]

The plan of the whole is made from headers (all holes). Then two models of its widths with random
codes, one dense layer and one of experts each, of which the larger has more experts, are converted.
The rest is the slope between the two, and called so. `cp` of the larger stands beside it. Needs
12 GB where FOLDER is.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from giants import DEEPSEEK_V3, MODELS, latent, make
from measure import load, machine, run, warm
from record import Row, add_option, gpu, publish

CODE = ("ckptq/checkpoint", "ckptq/convert", "ckptq/models", "ckptq/plan", "ckptq/quantize")
SCHEMES = ("nvfp4a16", "fp8-dynamic")


def rows(work: Path, experts_of: Sequence[int], device: str) -> list[Row]:
    whole = work / "whole"
    _, total = make(whole, MODELS["deepseek-v3"])
    plans = {scheme: run([*command(whole, scheme, device), "--dry-run"]) for scheme in SCHEMES}
    shutil.rmtree(whole)
    made: list[Row] = []
    sizes, took = [], {}
    for experts in experts_of:
        source = work / f"experts-{experts}"
        layers = replace(DEEPSEEK_V3, layers=2, dense=1, mtp=0, experts=experts, vocab=8000)
        sizes.append(make(source, latent(layers), seed=experts)[1])
        for scheme in SCHEMES:
            warm(source)
            out = work / "out"
            took[experts, scheme] = run([*command(source, scheme, device), "-o", out], sync=work)
            shutil.rmtree(out)
            print(f"{experts} {scheme}: load {load():.1f}", file=sys.stderr)
        warm(source)
        copied = run(["cp", "-r", source, out], sync=work)
        shutil.rmtree(out)
        shutil.rmtree(source)
    for scheme in SCHEMES:
        few, many = (took[experts, scheme] for experts in experts_of)
        more = sizes[1] - sizes[0]
        slope, cpu = (
            (many.seconds - few.seconds) / more,
            (many.cpu_seconds - few.cpu_seconds) / more,
        )
        left = total - sizes[1]
        made.append(
            {
                "scheme": scheme,
                "GB of the whole": total / 1e9,
                "seconds of its plan": plans[scheme].seconds,
                "peak MB of its plan": plans[scheme].peak_bytes / 1e6,
                "GB converted": sizes[1] / 1e9,
                "seconds": many.seconds,
                "seconds of cp": copied.seconds,
                "CPU seconds": many.cpu_seconds,
                "peak MB": many.peak_bytes / 1e6,
                "peak MB of the smaller": few.peak_bytes / 1e6,
                "MB/s by the slope": 1e-6 / slope,
                "hours of the whole, by the slope": (many.seconds + slope * left) / 3600,
                "CPU hours of the whole, by the slope": (many.cpu_seconds + cpu * left) / 3600,
            }
        )
    return made


def command(source: Path, scheme: str, device: str) -> list[str | Path]:
    quantize = [sys.executable, "-m", "ckptq", "quantize", source, "-s", scheme]
    return [*quantize, "--device", device]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where sources lie; default: a temporary folder")
    parser.add_argument("--experts", type=int, nargs=2, default=(16, 96), help="of the two models")
    parser.add_argument("--device", default="cpu")
    add_option(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        found = rows(Path(folder), given.experts, given.device)
    on_gpu = given.device != "cpu"
    what = "DeepSeek-V3 by its plan, and two of its layers at full width"
    name, where = ("terabyte-gpu", gpu()) if on_gpu else ("terabyte", machine())
    publish(name, what, found, code=CODE, machine=where, folder=given.record)


if __name__ == "__main__":
    main()
