"""`ckptq calibrate` on one GPU and under torchrun on several: whole commands, and equal files.

    python benchmarks/bench_ranks.py [--processes 1,2] [--samples 64,768] [--work /dev/shm/ranks]

The random 8B-shaped model and the tokens are those of bench_calibrate.py. Each number of processes
is run on a few samples first, which fills the page cache and compiles, then on two sizes. What a
million tokens more take is the slope between the two, without start-up and the reading of weights.
Needs as many CUDA devices as processes; on two H200 the defaults take about five minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench_calibrate import CODE as CALIBRATION
from bench_calibrate import make, tokens
from measure import run
from record import Row, add_option, gpu, publish

CODE = (*CALIBRATION, "ckptq/distributed")
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


def measured(processes: int, sizes: Sequence[int], work: Path) -> dict[int, float]:
    """Samples -> seconds."""
    calibrate(processes, work, 2 * processes)
    found = {}
    for samples in sizes:
        found[samples] = calibrate(processes, work, samples)
        alone, ours = (work / f"scales-{samples}-{n}" for n in (1, processes))
        if alone.exists():
            assert alone.read_bytes() == ours.read_bytes(), "the scales differ"
        print(f"{processes} processes, {samples} samples: {found[samples]:.1f} s", flush=True)
    return found


def slope(seconds: Mapping[int, float]) -> float:
    """Seconds of a million tokens, without what every run takes."""
    few, many = min(seconds), max(seconds)
    return (seconds[many] - seconds[few]) / ((many - few) * SEQ_LEN) * 1e6


def rows_of(seconds: Mapping[int, Mapping[int, float]]) -> Iterator[Row]:
    """A row for each number of processes, compared with the first."""
    first, most = next(iter(seconds)), max(next(iter(seconds.values())))
    for processes, took in seconds.items():
        row: dict[str, float | str] = {"processes": str(processes)}
        row |= {f"seconds, {samples} samples": each for samples, each in took.items()}
        row["s/M tokens"] = slope(took)
        row["x one"] = slope(seconds[first]) / slope(took)
        row["x one, with start-up"] = seconds[first][most] / took[most]
        yield row


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=numbers, default=[1, 2])
    parser.add_argument("--samples", type=numbers, default=[64, 768], help="two sizes")
    parser.add_argument("--work", type=Path)
    add_option(parser)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if options.make:
            make(SHAPE, work)
            return
        if not (work / "model").exists():
            subprocess.run([sys.executable, __file__, "--make", "--work", work], check=True)
        sizes = sorted(options.samples)
        seconds = {n: measured(n, sizes, work) for n in options.processes}
    publish(
        "ranks",
        "`ckptq calibrate` on one GPU and on several, Llama-3.1-8B shape",
        list(rows_of(seconds)),
        code=CODE,
        machine=f"{max(options.processes)} x {gpu()}",
        folder=options.record,
    )


if __name__ == "__main__":
    main()
