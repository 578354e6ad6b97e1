"""`repack` and `dequantize` of a quantized source against `cp -r`, as one table.

    python benchmarks/bench_repack.py

The source has the shapes of Llama-3.1-8B with FP8 weights in blocks of 128x128, as DeepSeek and
Qwen publish them. Each command runs whole and until its output is on the disk, with the source in
the page cache; they take turns, and the best turn counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
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


def measure(work: Path, turns: int) -> dict[str, list[Took]]:
    found: dict[str, list[Took]] = {}
    folder, out = work / "source", work / "out"
    ours = [sys.executable, "-m", "ckptq", "quantize", folder, "-o", out, "--device", "cpu", "-s"]
    commands = {"cp": ["cp", "-r", folder, out]} | {s: [*ours, s] for s in SCHEMES}
    for _ in range(turns):
        for tool, command in commands.items():
            warm(folder)
            found.setdefault(tool, []).append(run(command, sync=work))
            shutil.rmtree(out)
            print(f"{tool}: {found[tool][-1].seconds:.2f} s, load {load():.1f}", file=sys.stderr)
    return found


def rows(found: dict[str, list[Took]]) -> list[Row]:
    best = {tool: min(took, key=lambda t: t.seconds) for tool, took in found.items()}
    return [
        {
            "command": tool,
            "seconds": took.seconds,
            "of all turns": ", ".join(f"{t.seconds:.2f}" for t in found[tool]),
            "CPU seconds": took.cpu_seconds,
            "peak MB": took.peak_bytes / 1e6,
            "of cp's speed": best["cp"].seconds / took.seconds,
        }
        for tool, took in best.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default="work", help="a folder with room for 8 GB")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--source", type=Path, help="make the source in this folder, and end")
    add_option(parser)
    given = parser.parse_args()
    if given.source is not None:
        source(given.source, given.layers)
        return
    work = given.work / "bench-repack"
    work.mkdir(parents=True)
    try:
        began = load()
        # in a process of its own: children start with this one's peak
        run([sys.executable, __file__, "--source", work / "source", "--layers", str(given.layers)])
        nbytes = sum(f.stat().st_size for f in (work / "source").glob("*.safetensors"))
        found = measure(work, given.turns)
    finally:
        shutil.rmtree(work)
    what = f"FP8 blocks of {nbytes / 1e9:.1f} GB, written otherwise, load {began:.1f}"
    publish("repack", what, rows(found), code=CODE, machine=machine(), folder=given.record)


if __name__ == "__main__":
    main()
