"""Conversion against `cp -r` and llm-compressor's model_free_ptq, in one run, as one table.

    python benchmarks/bench_convert.py

Makes Llama-shaped bf16 checkpoints of random weights in `work/`, converts them to FP8 with dynamic
activations, and deletes everything again. Each command runs whole (imports included) and until its
output is on the disk, with the source in the page cache. Commands take turns, and the best of
several turns counts, because whatever else the machine does can only add. A table goes to stdout
and to `benchmarks/results/`, with the machine and the date in its name.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from measure import Took, load, machine, run, warm

HERE = Path(__file__).parent
LAYERS = {4: 8, 8: 17, 1: 1}
"""GB -> layers of Llama-3.1-8B's shapes, with a vocabulary of 32,000 (0.5 GB)."""

MODEL_FREE = """
import sys
from llmcompressor import model_free_ptq
source, out, workers = sys.argv[1:]
model_free_ptq(source, out, scheme="FP8_DYNAMIC", ignore=["model.embed_tokens", "lm_head"],
               max_workers=int(workers), device="cpu")
"""

Key = tuple[str, int]
"""(tool, GB)"""


def commands(source: Path, out: Path, given: argparse.Namespace) -> dict[str, list[str | Path]]:
    """What is compared, on one source."""
    python = sys.executable
    ours = [python, "-m", "ckptq", "quantize", source, "-o", out, "-s", given.scheme]
    found = {"cp": ["cp", "-r", source, out], "ckptq": [*ours, "--device", "cpu"]}
    if given.gpu:
        found["ckptq on a GPU"] = [*ours, "--device", "cuda"]
    if given.scheme == "fp8-dynamic" and not given.without_model_free:
        workers = str(len(os.sched_getaffinity(0)))
        found["model_free_ptq"] = [python, "-c", MODEL_FREE, source, out, workers]
    return found


def measure(work: Path, given: argparse.Namespace) -> dict[Key, list[Took]]:
    """Every command on every size, in turns; model_free_ptq once, on the smallest."""
    found: dict[Key, list[Took]] = {}
    for turn in range(given.turns):
        for size in given.gb:
            source, out = work / f"source-{size}", work / "out"
            for tool, command in commands(source, out, given).items():
                if tool == "model_free_ptq" and (turn or size != min(given.gb)):
                    continue
                warm(source)
                took = run(command, sync=work)
                shutil.rmtree(out)
                found.setdefault((tool, size), []).append(took)
                note(f"{tool} {size} GB: {took.seconds:.2f} s, load {load():.1f}")
    return found


def table(found: Mapping[Key, list[Took]], sizes: Mapping[int, int], start: Took) -> str:
    """The result as Markdown. `sizes`: GB -> bytes of the source."""
    best = {key: min(took, key=lambda t: t.seconds) for key, took in found.items()}
    lines = [
        "| source | tool | seconds | of all turns | CPU seconds | peak RSS | to cp |",
        "|---|---|---|---|---|---|---|",
    ]
    for (tool, size), took in sorted(best.items(), key=lambda item: item[0][1]):
        turns = ", ".join(f"{t.seconds:.2f}" for t in found[tool, size])
        ratio = took.seconds / best["cp", size].seconds
        lines.append(
            f"| {sizes[size] / 1e9:.2f} GB | {tool} | {took.seconds:.2f} | {turns} "
            f"| {took.cpu_seconds:.2f} | {took.peak_bytes / 1e6:.0f} MB | {ratio:.2f} |"
        )
    lines += ["", *summary(best, sizes, start)]
    return "\n".join(lines)


def summary(best: Mapping[Key, Took], sizes: Mapping[int, int], start: Took) -> list[str]:
    """The figures that a promise was made about."""
    small, large = min(sizes), max(sizes)
    lines = [
        f"start-up: {start.seconds:.2f} s for a checkpoint of a few kB, imports and exit included"
    ]
    if small != large:
        more = (sizes[large] - sizes[small]) / 1e9
        slope = {
            tool: (best[tool, large].seconds - best[tool, small].seconds) / more
            for tool in ("cp", "ckptq")
        }
        ratio = slope["ckptq"] / slope["cp"]
        lines.append(
            f"seconds per GB between {small} and {large} GB: cp {slope['cp']:.3f}, "
            f"ckptq {slope['ckptq']:.3f}, ratio {ratio:.2f} (promised: at most 1.3)"
        )
    if ("model_free_ptq", small) in best:
        faster = best["model_free_ptq", small].seconds / best["ckptq", small].seconds
        lines.append(
            f"all included, {small} GB: {faster:.1f} times as fast as model_free_ptq "
            "(promised: at least 5)"
        )
    return lines


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def synthetic(folder: Path, *arguments: str) -> int:
    """Make a checkpoint in a process of its own; the bytes of its tensors."""
    run([sys.executable, HERE / "make_synthetic.py", folder, *arguments])
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default="work", help="a folder with room for 21 GB")
    parser.add_argument("--gb", type=int, nargs="+", choices=LAYERS, default=[4, 8])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--scheme", default="fp8-dynamic")
    parser.add_argument("--without-model-free", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="and once more with --device cuda")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args()
    work = given.work / "bench-convert"
    work.mkdir(parents=True)
    try:
        began = load()
        synthetic(work / "tiny", "--shapes", "tiny")
        start = min((_start_up(work, given) for _ in range(given.turns)), key=lambda t: t.seconds)
        sizes = {
            gb: synthetic(work / f"source-{gb}", "--layers", str(LAYERS[gb])) for gb in given.gb
        }
        found = measure(work, given)
        title = f"# Conversion to {given.scheme} on {machine()}, {date.today()}"
        crowd = f"Load average {began:.1f} before, {load():.1f} after."
        command = f"`python benchmarks/bench_convert.py {' '.join(sys.argv[1:])}`".replace(
            " `", "`"
        )
        text = "\n\n".join([title, f"{command}. {crowd}", table(found, sizes, start)]) + "\n"
    finally:
        shutil.rmtree(work)
    print(text)
    given.results.mkdir(exist_ok=True)
    (given.results / f"{date.today()}-convert-{given.scheme}-{machine()}.md").write_text(text)


def _start_up(work: Path, given: argparse.Namespace) -> Took:
    took = run(commands(work / "tiny", work / "out", given)["ckptq"])
    shutil.rmtree(work / "out")
    return took


if __name__ == "__main__":
    main()
