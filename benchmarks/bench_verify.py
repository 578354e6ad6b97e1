"""`ckptq verify`: structure of checkpoints beyond 100 GB, and the round trip at the disk's speed.

    python benchmarks/bench_verify.py

Structure: finished checkpoints of Llama 70B's and Llama-4 Maverick's shapes, whose files have their
full size and take no disk; their headers are read once before. Round trip: a Llama-shaped bf16
checkpoint of random weights and its FP8 and INT4 conversions, in the page cache, beside `cat`,
`cp` and `sha256sum` of the same bytes. Each command runs whole, start-up included, in turns; the
best of several turns counts, because whatever else the machine does can only add. Everything is
made in `work/` and deleted again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from make_synthetic import SHAPES, make
from measure import Took, load, machine, run, warm
from record import Row, add_option, publish

HERE = Path(__file__).parent
CODE = ("ckptq/verify", "ckptq/checkpoint", "ckptq/quantize")

BIG = {"llama-70b": 112, "llama4-maverick": 24}
"""Shapes -> layers: 101 GB of FP8 in a dense model, 388 GB in 24 layers of 128 experts."""

HEADERS = """
import json, sys
from ckptq.verify.run import verify
report = verify(sys.argv[1], headers_only=True)
assert report.ok, report.counts
figures = {"seconds": report.seconds, "tensors": report.tensors_on_disk, "nbytes": report.nbytes}
open(sys.argv[2], "w").write(json.dumps(figures))
"""


def sparse_output(source: Path, out: Path) -> None:
    """What `ckptq quantize -s fp8-dynamic` makes of the source, by its plan: headers and holes."""
    from ckptq.checkpoint.open import open_checkpoint
    from ckptq.checkpoint.write import lay_out, write_index
    from ckptq.convert.documents import quantization_config
    from ckptq.plan.make import make_plan
    from ckptq.recipes.load import load_scheme

    ckpt = open_checkpoint(source)
    plan = make_plan(ckpt, load_scheme("fp8-dynamic"))
    shards = {
        file: {name: spec for unit in units for name, spec in unit.writes.items()}
        for file, units in plan.shards.items()
    }
    out.mkdir()
    for file, specs in shards.items():
        head, _ = lay_out(specs, {"format": "pt"})
        with (out / file).open("wb") as handle:
            handle.write(head)
            handle.truncate(len(head) + sum(spec.nbytes for spec in specs.values()))
    write_index(out, shards)
    config = {**ckpt.config, **quantization_config(plan, None)}
    (out / "config.json").write_text(json.dumps(config))


def apart(work: Callable[..., object], *paths: Path) -> None:
    """In a process of its own: what imports torch here would count as every child's peak."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=paths)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work} failed")


def structure(work: Path, turns: int) -> Iterator[Row]:
    """Rows of the first table."""
    for name, layers in BIG.items():
        source, out = work / f"{name}-source", work / name
        make(source, replace(SHAPES[name], layers=layers), sparse=True)
        apart(sparse_output, source, out)
        figures = work / "figures.json"
        command = [sys.executable, "-c", HEADERS, out, figures]
        took, inside = [], []
        for _ in range(turns):
            took.append(run(command))
            said = json.loads(figures.read_text())
            inside.append(said["seconds"])
        best = min(took, key=lambda t: t.seconds)
        files = len(list(out.glob("*.safetensors")))
        yield {
            "checkpoint": f"{name}, {layers} layers",
            "GB": said["nbytes"] / 1e9,
            "files": files,
            "tensors": said["tensors"],
            "seconds": best.seconds,
            "within Python": min(inside),
            "peak MB": best.peak_bytes / 1e6,
        }
        shutil.rmtree(source)
        shutil.rmtree(out)


def commands(source: Path, out: Path, copied: Path) -> dict[str, list[str | Path]]:
    """What is compared: each reads the source and the output whole, except where it says so."""
    files = [*sorted(source.glob("*.safetensors")), *sorted(out.glob("*.safetensors"))]
    verify = [sys.executable, "-m", "ckptq", "verify", out]
    return {
        "cat > /dev/null": ["cat", *files],
        "cp to the disk": ["cp", *files, copied],
        "sha256sum": ["sha256sum", *files],
        "verify --source": [*verify, "--source", source],
        "verify --source --fast (samples)": [*verify, "--source", source, "--fast"],
        "verify (output alone)": verify,
    }


def round_trip(work: Path, given: argparse.Namespace) -> Iterator[Row]:
    """Rows of the second table."""
    source = work / "source"
    apart(partial(make, shapes=replace(SHAPES["llama-8b"], layers=given.layers)), source)
    for scheme in given.schemes:
        out, copied = work / scheme, work / "copied"
        convert = [sys.executable, "-m", "ckptq", "quantize", source, "-o", out, "-s", scheme]
        run(convert, sync=work)
        nbytes = sum(f.stat().st_size for d in (source, out) for f in d.glob("*.safetensors"))
        found: dict[str, list[Took]] = {}
        for _ in range(given.turns):
            for name in commands(source, out, copied):
                copied.mkdir()
                warm(source)
                warm(out)
                command = commands(source, out, copied)[name]
                took = run(command, sync=copied if command[0] == "cp" else None)
                shutil.rmtree(copied)
                found.setdefault(name, []).append(took)
                note(f"{scheme}: {name} {took.seconds:.2f} s, load {load():.1f}")
        for name, took_all in found.items():
            yield _row(scheme, name, took_all, nbytes)
        shutil.rmtree(out)
    shutil.rmtree(source)


def _row(scheme: str, name: str, found: list[Took], nbytes: int) -> Row:
    best = min(found, key=lambda t: t.seconds)
    reads_all = "fast" not in name and "alone" not in name
    return {
        "command": f"{scheme}, {nbytes / 1e9:.1f} GB, {name}",
        "seconds": best.seconds,
        "of all turns": ", ".join(f"{t.seconds:.2f}" for t in found),
        "CPU seconds": best.cpu_seconds,
        "s/GB": best.seconds / nbytes * 1e9 if reads_all else None,
        "peak MB": best.peak_bytes / 1e6,
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--layers", type=int, default=8, help="of Llama 8B's shapes: 8 are 4 GB")
    parser.add_argument("--schemes", nargs="+", default=["fp8-dynamic", "w4a16"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["structure", "round-trip"])
    add_option(parser)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    parts: dict[str, tuple[str, Callable[[], Iterator[Row]]]] = {
        "structure": ("`ckptq verify`, headers only", lambda: structure(given.work, given.turns)),
        "round-trip": (
            "`ckptq verify --source` beside cat, cp and sha256sum",
            lambda: round_trip(given.work, given),
        ),
    }
    for name in given.parts:
        what, rows = parts[name]
        where = {"machine": machine(), "folder": given.record}
        publish(f"verify-{name}", what, list(rows()), code=CODE, **where)


if __name__ == "__main__":
    main()
