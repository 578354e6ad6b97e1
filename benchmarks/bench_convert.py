"""Conversion against `cp -r` and llm-compressor's model_free_ptq, in one run, as one table.

    python benchmarks/bench_convert.py
    python benchmarks/bench_convert.py --gb 1 4 --searched w4a16-g32 nvfp4a16

Makes Llama-shaped bf16 checkpoints of random weights in `work/`, converts them to FP8 with dynamic
activations, and deletes everything again. Each command runs whole (imports included) and until its
output is on the disk, with the source in the page cache. Commands take turns, and the best of
several turns counts, because whatever else the machine does can only add. With `--searched`,
instead: schemes with and without a search of ranges, on a GPU and on the cores, and what a larger
checkpoint takes more than a smaller one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from measure import Took, load, machine, run, warm
from record import Row, add_option, gpu, publish

HERE = Path(__file__).parent
CODE = ("ckptq/checkpoint", "ckptq/convert", "ckptq/quantize")
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


def rows(found: Mapping[Key, list[Took]], sizes: Mapping[int, int], start: Took) -> Iterator[Row]:
    """The best turn of each tool and size, then what all sizes together say; `sizes`: GB -> bytes
    of the source."""
    best = {key: min(took, key=lambda t: t.seconds) for key, took in found.items()}
    for (tool, size), took in sorted(best.items(), key=lambda item: item[0][1]):
        yield {
            "command": f"{size} GB, {tool}",
            "seconds": took.seconds,
            "of all turns": ", ".join(f"{t.seconds:.2f}" for t in found[tool, size]),
            "CPU seconds": took.cpu_seconds,
            "peak MB": took.peak_bytes / 1e6,
            "x cp": took.seconds / best["cp", size].seconds,
        }
    yield from slopes(best, sizes)
    small = min(sizes)
    if ("model_free_ptq", small) in best:
        faster = best["model_free_ptq", small].seconds / best["ckptq", small].seconds
        yield {"command": "model_free_ptq", "x ckptq": faster}
    yield {"command": "start-up", "seconds": start.seconds}


def slopes(best: Mapping[Key, Took], sizes: Mapping[int, int]) -> Iterator[Row]:
    """Seconds per GB more, of cp and of ckptq: what start-up does not blur."""
    small, large = min(sizes), max(sizes)
    if small == large:
        return
    more = (sizes[large] - sizes[small]) / 1e9
    seconds = {t: (best[t, large].seconds - best[t, small].seconds) / more for t in ("cp", "ckptq")}
    yield {"command": "cp", "s/GB": seconds["cp"]}
    yield {"command": "ckptq", "s/GB": seconds["ckptq"], "x cp": seconds["ckptq"] / seconds["cp"]}


def searched(work: Path, sizes: Mapping[int, int], given: argparse.Namespace) -> Iterator[Row]:
    """Each scheme to the nearest and with a search on a GPU, and with the search on the cores."""
    few, many = min(sizes), max(sizes)
    for scheme in given.searched:
        ways = ((scheme, "cuda"), (f"{scheme}-search", "cuda"), (f"{scheme}-search", "cpu"))
        for name, device in ways:
            best: dict[int, Took] = {}
            for size in (few, many):
                source, out = work / f"source-{size}", work / "out"
                command = [sys.executable, "-m", "ckptq", "quantize", source, "-s", name]
                took = []
                for _ in range(given.turns):
                    warm(source)
                    took.append(run([*command, "--device", device, "-o", out], sync=work))
                    shutil.rmtree(out)
                best[size] = min(took, key=lambda t: t.seconds)
                note(f"{name} on {device}, {size} GB: {best[size].seconds:.2f} s")
            more = best[many].seconds - best[few].seconds
            yield {
                "command": f"{name}, {device}",
                f"seconds of {many} GB": best[many].seconds,
                "MB/s": (sizes[many] - sizes[few]) / more / 1e6,
                "CPU seconds": best[many].cpu_seconds,
                "peak MB": best[many].peak_bytes / 1e6,
            }


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
    parser.add_argument("--searched", nargs="+", metavar="SCHEME", help="see above")
    add_option(parser)
    given = parser.parse_args()
    work = given.work / "bench-convert"
    work.mkdir(parents=True)
    try:
        began = load()
        if given.searched:
            sizes = _sources(work, given.gb)
            what = "Conversion with and without a search of ranges, on a GPU and on the cores"
            table = list(searched(work, sizes, given))
            publish("convert-search", what, table, code=CODE, machine=gpu(), folder=given.record)
            return
        synthetic(work / "tiny", "--shapes", "tiny")
        start = min((_start_up(work, given) for _ in range(given.turns)), key=lambda t: t.seconds)
        sizes = _sources(work, given.gb)
        found = measure(work, given)
    finally:
        shutil.rmtree(work)
    what = f"Conversion to {given.scheme} beside cp and model_free_ptq, load {began:.1f}"
    table = list(rows(found, sizes, start))
    name = "convert" if given.scheme == "fp8-dynamic" else f"convert-{given.scheme}"
    publish(name, what, table, code=CODE, machine=machine(), folder=given.record)


def _sources(work: Path, gb_of: Iterable[int]) -> dict[int, int]:
    """GB -> bytes of the checkpoint of about that size, made now."""
    return {gb: synthetic(work / f"source-{gb}", "--layers", str(LAYERS[gb])) for gb in gb_of}


def _start_up(work: Path, given: argparse.Namespace) -> Took:
    took = run(commands(work / "tiny", work / "out", given)["ckptq"])
    shutil.rmtree(work / "out")
    return took


if __name__ == "__main__":
    main()
