"""`ckptq calibrate` on one GPU and under torchrun on several: whole commands, and equal files.

    python benchmarks/bench_ranks.py [--processes 2] [--samples 256] [--work DIR]

The random 8B-shaped model and the tokens are those of bench_calibrate.py. Each command is run on
a few samples first, which fills the page cache and compiles. Needs as many CUDA devices.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_calibrate import CODE, make, tokens
from measure import run
from record import Row, add_option, gpu, publish

SHAPE, SEQ_LEN = "llama-8b", 2048


def calibrate(processes: int, work: Path, samples: int) -> float:
    """Seconds of the command, start-up included."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(processes)]
    text = work / f"{samples}.jsonl"
    if not text.exists():
        rows = tokens(SHAPE, samples, SEQ_LEN)
        text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    command = [*start, "-m", "ckptq", "calibrate", work / "model", "--device", "cuda"]
    command += ["--data", text, "--samples", str(samples), "--seq-len", str(SEQ_LEN)]
    return run([*command, "-o", work / f"scales-{samples}-{processes}"]).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--work", type=Path)
    add_option(parser)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        if options.make:
            make(SHAPE, work)
            return
        if not (work / "model").exists():
            subprocess.run([sys.executable, __file__, "--make", "--work", work], check=True)
        seconds = {}
        for processes in (1, options.processes):
            calibrate(processes, work, 2 * options.processes)
            seconds[processes] = calibrate(processes, work, options.samples)
        one, several = (work / f"scales-{options.samples}-{n}" for n in seconds)
        assert one.read_bytes() == several.read_bytes(), "the scales differ"
    rows: list[Row] = [
        {
            "processes": f"{options.samples} samples, {processes} processes",
            "seconds": took,
            "tokens/s": options.samples * SEQ_LEN / took,
            "x one": seconds[1] / took,
        }
        for processes, took in seconds.items()
    ]
    what = "`ckptq calibrate` on one GPU and on several, Llama-3.1-8B shape"
    machine = f"{options.processes} x {gpu()}"
    publish("ranks", what, rows, code=CODE, machine=machine, folder=options.record)


if __name__ == "__main__":
    main()
