"""What ckptq makes of a fixed set of tiny checkpoints, as digests: a change that must not change
any output is held against a record from before it.

    python benchmarks/fixed_outputs.py --save before.json
    python benchmarks/fixed_outputs.py --against before.json     # exit code 1 where they differ

Families are those of tests/families, random weights with a fixed seed. A case is a family and what
is done with it; it ends in the sha256 of every file, or in the words of the refusal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from families.sources import save
from transformers.utils import logging

from ckptq.calibrate.request import CalibrationRequest
from ckptq.calibrate.to_file import ScalesRequest, calibrate_to_file
from ckptq.convert.output import RunOptions
from ckptq.convert.permute import PermuteRequest, permute
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import CkptqError
from ckptq.recipes.load import load_scheme
from ckptq.rope_order import RopeOrder

FAMILIES = (
    "llama",
    "mixtral",
    "qwen3_moe",
    "gemma3",
    "llama4",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_5_moe",
    "jamba",
    "phi3",
)
SCHEMES = (
    "fp8-dynamic",
    "fp8-block",
    "fp8-per-head",
    "w8a8",
    "w4a16-g32",
    "w4a16-asym",
    "nvfp4a16",
    "nvfp4",
)
ROTATED = ("fp8-per-head", "w8a8", "w4a16-g32")
"""Schemes that Llama-4 is also quantized with in the half-split order."""

Outcome = str | dict[str, str]
"""A refusal, or file -> sha256."""


def cases(data: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(name, what writes its result to a path); sources lie in ./sources."""
    text = CalibrationRequest(data=data, samples=3, seq_len=16, batch_size=2)

    def quantized(family: str, scheme: str, **options: object) -> Callable[[Path], None]:
        request = {
            "model": Path("sources", family),
            "recipe": load_scheme(scheme),
            "calibration": text,
            "options": RunOptions(workers=1, device="cpu"),
            **options,
        }
        return lambda out: quantize(QuantizeRequest(out=out, **request)) and None

    def calibrated(family: str, scheme: str) -> Callable[[Path], None]:
        def run(out: Path) -> None:
            model, recipe = Path("sources", family), load_scheme(scheme)
            calibrate_to_file(
                ScalesRequest(model=model, recipe=recipe, output=out, text=text, device="cpu")
            )

        return run

    def permuted(family: str, order: RopeOrder) -> Callable[[Path], None]:
        def run(out: Path) -> None:
            permute(PermuteRequest(model=Path("sources", family), out=out, to=order))

        return run

    for family in FAMILIES:
        for scheme in SCHEMES:
            yield f"{family} {scheme}", quantized(family, scheme)
        yield f"{family} calibrate", calibrated(family, "fp8-per-head")
    yield "llama calibrate nvfp4", calibrated("llama", "nvfp4")
    for order in RopeOrder:
        yield f"llama4 permute {order}", permuted("llama4", order)
    for scheme in ROTATED:
        yield f"llama4 {scheme} half-split", quantized("llama4", scheme, rope_order="half-split")
    yield "llama fp8-dynamic shards", quantized("llama", "fp8-dynamic", shard_bytes=1 << 20)


def outcome(run: Callable[[Path], None], out: Path) -> Outcome:
    try:
        run(out)
    except CkptqError as error:
        return f"{type(error).__name__}: {error}"
    files = [out] if out.is_file() else sorted(f for f in out.rglob("*") if f.is_file())
    return {
        str(file.relative_to(out.parent)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def record(folder: Path, only: str) -> dict[str, Outcome]:
    """Every case whose name contains `only`, done in `folder`."""
    logging.disable_progress_bar()
    os.chdir(folder)  # files that name their source name it alike on every machine
    for family in FAMILIES:
        save(family, Path("sources"))
    draw = random.Random(0)
    rows = [[draw.randrange(3, 200) for _ in range(16)] for _ in range(3)]
    Path("ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    found: dict[str, Outcome] = {}
    for name, run in cases("ids.jsonl"):
        if only in name:
            found[name] = outcome(run, Path(name.replace(" ", "-"), "result"))
            print(f"{name}: {shown(found[name])}", file=sys.stderr)
    return found


def shown(found: Outcome | None) -> str:
    if not isinstance(found, dict):
        return str(found)
    return f"{len(found)} files, {hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]}"


def differences(before: Mapping[str, Outcome], now: Mapping[str, Outcome]) -> Iterator[str]:
    """One line for each case that is not what it was; a file that differs is named."""
    for name in sorted(before.keys() | now.keys()):
        was, found = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(found, dict):
            files = {f for f in was.keys() | found.keys() if was.get(f) != found.get(f)}
            if files:
                yield f"{name}: {', '.join(sorted(files))}"
        elif was != found:
            yield f"{name}: was {shown(was)}, is {shown(found)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="write the record here")
    parser.add_argument("--against", type=Path, help="a record to compare with")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    asked = parser.parse_args()
    save_to = asked.save.absolute() if asked.save else None
    before = json.loads(asked.against.read_text()) if asked.against else None
    with tempfile.TemporaryDirectory() as folder:
        now = record(Path(folder), asked.only)
    if save_to is not None:
        save_to.write_text(json.dumps(now, indent=1))
    if before is None:
        return 0
    lines = list(differences({k: v for k, v in before.items() if asked.only in k}, now))
    print("\n".join(lines) or f"{len(now)} cases, all equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
