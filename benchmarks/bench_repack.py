"""`repack` and `dequantize` of a quantized source against `cp -r` of what they write, as one table.

    python benchmarks/bench_repack.py

The sources have the shapes of Llama-3.1-8B with FP8 weights in blocks of 128x128, as DeepSeek and
Qwen publish them. Each command runs whole and until its output is on the disk, with what it reads
in the page cache; they take turns, and the best turn counts. `dequantize` writes twice what it
reads, so it stands beside `cp` of its output. Two sizes give seconds per GB written, without the
start-up.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from make_synthetic import SHAPES, Specs, config, tensors
from measure import Took, load, machine, run, warm
from record import Row, add_option, publish

from ckptq.checkpoint.write import lay_out, write_index
from ckptq.spec import TensorSpec

CODE = ("ckptq/checkpoint", "ckptq/convert", "ckptq/models", "ckptq/quantize")
BLOCK = 128
METHOD = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip
SCHEMES = ("repack", "dequantize")

Sizes = dict[str, int]
"""Bytes of the "source", and of the output of each scheme."""


def source(out: Path, layers: int) -> None:
    """Write the model, a file for each GB."""
    shapes = replace(SHAPES["llama-8b"], layers=layers)
    runs: list[Specs] = [{}]
    for name, spec in tensors(shapes):
        if sum(each.nbytes for each in runs[-1].values()) > 1_000_000_000:
            runs.append({})
        runs[-1] |= {name: spec} if "_proj" not in name else in_blocks(name, spec)
    out.mkdir(parents=True)
    shards = {f"model-{i:05d}-of-{len(runs):05d}.safetensors": r for i, r in enumerate(runs, 1)}
    for seed, (file, specs) in enumerate(shards.items()):
        write(out / file, specs, seed)
    write_index(out, shards)
    (out / "config.json").write_text(json.dumps(config(shapes) | {"quantization_config": METHOD}))


def in_blocks(name: str, spec: TensorSpec) -> Specs:
    rows, columns = spec.shape
    scales = TensorSpec("F32", (-(-rows // BLOCK), -(-columns // BLOCK)))
    return {name: TensorSpec("F8_E4M3", spec.shape), f"{name}_scale_inv": scales}


def write(file: Path, specs: Specs, seed: int) -> None:
    """Random codes of which none is NaN, scales of a thousandth, norms and embeddings as codes."""
    import torch

    torch.manual_seed(seed)
    head, _ = lay_out(specs, {"format": "pt"})
    with file.open("wb") as handle:
        handle.write(head)
        for name, spec in specs.items():
            if name.endswith("_scale_inv"):
                made = torch.full(spec.shape, 1e-3)
            else:
                made = torch.randint(0, 0x70, (spec.nbytes,), dtype=torch.uint8)
            handle.write(made.view(torch.uint8).numpy().data)


def sizes_of(folder: Path) -> Sizes:
    """Bytes of the source's tensors, and of what each scheme makes of it."""
    # at the end: these import torch, and children start with this process's peak
    from ckptq.checkpoint.open import open_checkpoint
    from ckptq.plan.make import make_plan
    from ckptq.recipes.load import load_scheme

    ckpt = open_checkpoint(folder)
    made = {scheme: make_plan(ckpt, load_scheme(scheme)).write_bytes for scheme in SCHEMES}
    return {"source": ckpt.nbytes, **made}


def measure(work: Path, layers: int, turns: int) -> dict[str, list[Took]]:
    """Every command on one source, in turns; `cp` of each output under "cp of" its scheme."""
    found: dict[str, list[Took]] = {}
    folder, out, copy = work / f"source-{layers}", work / "out", work / "copy"
    for _ in range(turns):
        for scheme in SCHEMES:
            ours = [sys.executable, "-m", "ckptq", "quantize", folder, "-o", out, "-s", scheme]
            warm(folder)
            found.setdefault(scheme, []).append(run([*ours, "--device", "cpu"], sync=work))
            warm(out)
            cp = ["cp", "-r", "--reflink=never", out, copy]
            found.setdefault(f"cp of {scheme}", []).append(run(cp, sync=work))
            took = found[scheme][-1].seconds, found[f"cp of {scheme}"][-1].seconds
            note = f"{scheme}: {took[0]:.2f} s, cp {took[1]:.2f} s, load {load():.1f}"
            print(note, file=sys.stderr)
            shutil.rmtree(out)
            shutil.rmtree(copy)
    return found


def rows(found: Mapping[int, dict[str, list[Took]]], sizes: Mapping[int, Sizes]) -> Iterator[Row]:
    """The best turn of each size and scheme, then what two sizes together say."""
    best = {
        layers: {tool: min(took, key=lambda t: t.seconds) for tool, took in each.items()}
        for layers, each in found.items()
    }
    for layers, took in best.items():
        for scheme in SCHEMES:
            cp = took[f"cp of {scheme}"].seconds
            yield {
                "command": f"{sizes[layers]['source'] / 1e9:.1f} GB, {scheme}",
                "GB written": sizes[layers][scheme] / 1e9,
                "seconds": took[scheme].seconds,
                "of all turns": ", ".join(f"{t.seconds:.2f}" for t in found[layers][scheme]),
                "CPU seconds": took[scheme].cpu_seconds,
                "peak MB": took[scheme].peak_bytes / 1e6,
                "cp's seconds": cp,
                "of cp's speed": cp / took[scheme].seconds,
            }
    small, large = min(sizes), max(sizes)
    for scheme in SCHEMES if small != large else ():
        more = (sizes[large][scheme] - sizes[small][scheme]) / 1e9
        tools = (scheme, f"cp of {scheme}")
        ours, cp = ((best[large][t].seconds - best[small][t].seconds) / more for t in tools)
        yield {"command": scheme, "s/GB": ours, "cp's s/GB": cp, "of cp's speed": cp / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default="work", help="a folder with room for 22 GB")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16], help="one size or two")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--source", type=Path, help="make the source in this folder, and end")
    add_option(parser)
    given = parser.parse_args()
    if given.source is not None:
        source(given.source, given.layers[0])
        return
    work = given.work / "bench-repack"
    work.mkdir(parents=True)
    found: dict[int, dict[str, list[Took]]] = {}
    try:
        began = load()
        for layers in given.layers:
            folder = work / f"source-{layers}"
            # in a process of its own: children start with this one's peak
            run([sys.executable, __file__, "--source", folder, "--layers", str(layers)])
            found[layers] = measure(work, layers, given.turns)
        sizes = {layers: sizes_of(work / f"source-{layers}") for layers in given.layers}
    finally:
        shutil.rmtree(work)
    what = f"FP8 blocks written otherwise, beside cp of what is written, load {began:.1f}"
    table = list(rows(found, sizes))
    publish("repack", what, table, code=CODE, machine=machine(), folder=given.record)


if __name__ == "__main__":
    main()
