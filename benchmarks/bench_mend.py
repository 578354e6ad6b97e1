"""`ckptq mend`: a field of config.json at 388 GB, and repairs of values beside `cp`.

    python benchmarks/bench_mend.py

Config: a finished FP8 checkpoint of Llama-4 Maverick's shapes, 24 layers, whose files have their
full size and take no disk, with a field of its quantization_config missing. Values: a Llama-shaped
FP8 checkpoint of random weights, in the page cache, with wrong scales in every shard; beside
`cp` of the same files. Each command runs whole, start-up included, in turns; the best counts.
Everything is made in `work/` and deleted again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench_verify import HERE, apart, note, sparse_output
from make_synthetic import SHAPES, make
from measure import Took, load, machine, run, warm
from record import Row, add_option, publish

CODE = ("ckptq/mend", "ckptq/verify", "ckptq/convert", "ckptq/checkpoint")

LAYERS = 24
"""Of Maverick's shapes: 388 GB of FP8."""


WRONG = {
    "flat": "shapes, {}, headers only",
    "reciprocals": "values, {}, verified before and after",
}
"""What is wrong with all scales -> the row's name."""


def forget_the_status(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("quantization_status", None)
    (folder / "config.json").write_text(json.dumps(config))


def in_every_shard(folder: Path, scales: str) -> None:
    """All scales of weights, "flat" or as "reciprocals"."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in (n for n in tensors if n.endswith("weight_scale")):
            held = tensors[name]
            tensors[name] = held.flatten() if scales == "flat" else 1 / held
        save_file(tensors, file, {"format": "pt"})


def config(work: Path, turns: int) -> Iterator[Row]:
    """Rows of the first table."""
    source, ckpt = work / "maverick-source", work / "maverick"
    make(source, replace(SHAPES["llama4-maverick"], layers=LAYERS), sparse=True)
    apart(sparse_output, source, ckpt)
    nbytes = sum(file.stat().st_size for file in ckpt.glob("*.safetensors"))
    out, kept = work / "mended", ckpt / "config.json.before-mend"
    mend = [sys.executable, "-m", "ckptq", "mend", ckpt]
    commands = {"new folder": [*mend, out, "--headers-only"],
                "in place": [*mend, "--in-place"]}  # fmt: skip
    for name, command in commands.items():
        found = []
        for _ in range(turns):
            forget_the_status(ckpt)
            found.append(run(command))
            shutil.rmtree(out, ignore_errors=True)
            kept.unlink(missing_ok=True)
        yield {
            "repair": f"config, {nbytes / 1e9:.0f} GB, {name}",
            **_figures(found),
        }
    shutil.rmtree(source)
    shutil.rmtree(ckpt)


def values(work: Path, turns: int, layers: int) -> Iterator[Row]:
    """Rows of the second table."""
    source, good = work / "source", work / "good"
    apart(partial(make, shapes=replace(SHAPES["llama-8b"], layers=layers)), source)
    quantize = ["quantize", source, "-o", good, "-s", "fp8-dynamic", "--shard-size", "500MB"]
    run([sys.executable, "-m", "ckptq", *quantize], sync=work)
    shutil.rmtree(source)
    for scales, what in WRONG.items():
        more = ["--headers-only"] if scales == "flat" else []
        broken, out = work / scales, work / "mended"
        shutil.copytree(good, broken)
        apart(partial(in_every_shard, scales=scales), broken)
        nbytes = sum(file.stat().st_size for file in broken.glob("*.safetensors"))
        mend: list[str | Path] = [sys.executable, "-m", "ckptq", "mend", broken, out, *more]
        commands: dict[str, list[str | Path]] = {
            "cp": ["cp", "-r", "--reflink=never", broken, out],
            "mend": mend,
        }
        found: dict[str, list[Took]] = {}
        for _ in range(turns):
            for name, command in commands.items():
                warm(broken)
                found.setdefault(name, []).append(run(command, sync=work))
                shutil.rmtree(out)
                note(f"{scales}: {name} {found[name][-1].seconds:.2f} s, load {load():.1f}")
        cp = min(took.seconds for took in found["cp"])
        row = _figures(found["mend"])
        yield {
            "repair": what.format(f"{nbytes / 1e9:.1f} GB"),
            **row,
            "cp's seconds": cp,
            "x cp": row["seconds"] / cp,
        }
        shutil.rmtree(broken)
    shutil.rmtree(good)


def _figures(found: list[Took]) -> dict[str, float]:
    best = min(found, key=lambda took: took.seconds)
    return {
        "seconds": best.seconds,
        "CPU seconds": best.cpu_seconds,
        "peak MB": best.peak_bytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--layers", type=int, default=8, help="of Llama 8B's shapes: 8 are 4 GB")
    parser.add_argument("--turns", type=int, default=3)
    add_option(parser)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    found = [
        *config(given.work, given.turns),
        *values(given.work, given.turns, given.layers),
    ]
    publish("mend", "`ckptq mend`", found, code=CODE, machine=machine(), folder=given.record)


if __name__ == "__main__":
    main()
