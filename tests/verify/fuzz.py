"""Damage of any kind, anywhere in a checkpoint: `verify` reports it or says what it cannot read.

Never a traceback, never a hang, never memory beyond a bound; every format in every family. The
default run of the tests does a few hundred; by hand, in numbers:

    PYTHONPATH=tests python tests/verify/fuzz.py --cases 10000
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny.trials import memory, places, reset_peak, within

from ckptq.errors import CkptqError
from ckptq.verify.run import verify

SECONDS = 30
"""A checkpoint this small is read in a tenth of a second."""

GROWTH = 256
"""MB that one case may take beyond what the process held before it; a checkpoint has 1 MB."""

READ = ("config.json", "model.safetensors.index.json")
"""What `verify` makes sense of, beside the shards."""

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 1 << 40, -(1 << 70), 1e308, "", "x", "re:(", "re:.*", "Linear", [], {},
    [[]], [None], {"a": {}}, "\ud800".encode("utf-8", "replace").decode(), "float", "channel", 128,
)  # fmt: skip


def a_file(rng: random.Random, folder: Path) -> Path:
    """Mostly one that `verify` reads, at times any."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    read = [p for p in files if p.suffix == ".safetensors" or p.name in READ]
    return rng.choice(read if rng.random() < 0.8 else files)


def flip_bytes(rng: random.Random, folder: Path) -> None:
    """A few bytes of one file."""
    file = a_file(rng, folder)
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)


def damage_header(rng: random.Random, folder: Path) -> None:
    """Bytes within the header of a shard, where names, shapes and places are."""
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(min(length, len(data)))] = rng.choice(b'0123456789"{}[]:,abcXYZ\x00\xff')
    file.write_bytes(data)


def edit_header(rng: random.Random, folder: Path) -> None:
    """A valid header that says something else: dtypes, shapes, places, names."""
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(sorted(header))
    entry = header[name]
    what = rng.choice(("dtype", "shape", "data_offsets", "rename", "drop"))
    if what == "rename":
        header[rng.choice((name.replace("q", "k"), name + ".x", "", "a" * 300))] = header.pop(name)
    elif what == "drop":
        del header[name]
    elif what == "dtype":
        entry[what] = rng.choice(("F8_E4M3", "I8", "U8", "BOOL", "F8_E5M2", "F8_E8M0", "C64", 3))
    elif isinstance(entry.get(what), list) and rng.random() < 0.5:
        entry[what] = rng.choice((entry[what][::-1], [1, *entry[what]], entry[what][:1], []))
    else:
        entry[what] = rng.choice(JUNK)
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def truncate(rng: random.Random, folder: Path) -> None:
    file = a_file(rng, folder)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data) + 1)])


def edit_json(rng: random.Random, folder: Path) -> None:
    """One value of config.json or of the index becomes something else, or goes."""
    file = folder / rng.choice([name for name in READ if (folder / name).exists()])
    value = json.loads(file.read_text())
    found = places(value)
    if not found:
        return
    container, key = rng.choice(found)
    if rng.random() < 0.2:
        del container[key]
    else:
        container[key] = rng.choice(JUNK)
    file.write_text(json.dumps(value))


def exchange_files(rng: random.Random, folder: Path) -> None:
    a, b = rng.sample(sorted(p for p in folder.iterdir() if p.is_file()), 2)
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)


def lose_a_file(rng: random.Random, folder: Path) -> None:
    file = a_file(rng, folder)
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()


DAMAGE: tuple[Callable[[random.Random, Path], None], ...] = (
    flip_bytes, flip_bytes, damage_header, edit_header, edit_header, truncate, edit_json, edit_json,
    edit_json, exchange_files, lose_a_file,
)  # fmt: skip


def run_case(good: Path, source: Path, scratch: Path, seed: int) -> str:
    """Damage a copy and verify it. How it ended; raises what must not happen."""
    rng = random.Random(seed)
    if scratch.exists():
        shutil.rmtree(scratch)
    shutil.copytree(good, scratch)
    rng.choice(DAMAGE)(rng, scratch)
    try:
        with within(SECONDS):
            whole = source if rng.random() < 0.7 else None
            report = verify(scratch, whole, fast=rng.random() < 0.3)
        json.dumps(report.to_dict(), allow_nan=False)
        return "found" if report.findings else "no finding"
    except CkptqError as error:
        if not str(error):
            raise RuntimeError(f"{type(error).__name__} without a message") from error
        return type(error).__name__


class TooLarge(Exception):
    """A case took more memory than `GROWTH`."""


@dataclass(slots=True)
class Outcome:
    """How the cases ended."""

    ended: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    """What must not happen: one line for each case."""
    growth_mb: int = 0
    """The most that any case took beyond what the process held before it."""
    seconds: float = 0.0
    """The slowest case."""

    def one(self, good: Path, source: Path, scratch: Path, seed: int) -> None:
        """Run one case and count it."""
        held, began = reset_peak(), time.monotonic()
        try:
            how = run_case(good, source, scratch, seed)
            growth = memory("VmHWM") - held
            self.growth_mb = max(self.growth_mb, growth)
            self.seconds = max(self.seconds, time.monotonic() - began)
            if growth > GROWTH:
                raise TooLarge(f"took {growth} MB")
            self.ended[how] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what must not happen is what is looked for
            self.failed.append(f"seed {seed}, {good.name}: {type(error).__name__}: {error}")


def run_cases(made: Sequence[tuple[Path, Path]], scratch: Path, seeds: range) -> Outcome:
    """Cases over (checkpoint, its source), taken in turn."""
    outcome = Outcome()
    for case, seed in enumerate(seeds):
        outcome.one(*made[case % len(made)], scratch, seed)
        if case % 500 == 499:
            print(f"{case + 1} cases, {len(outcome.failed)} failed", file=sys.stderr, flush=True)
    return outcome


def make_all(folder: Path, families: Sequence[str], weights: Sequence[str]):
    """Good checkpoints of several shards, every second one with scales of cache and attention."""
    from verify_checkpoints import convert, recipe, save_source

    for i, family in enumerate(families):
        source = save_source(family, folder / f"{family}-source")
        for j, kind in enumerate(weights):
            split = family == "llama4" and ("asym" in kind or "block" in kind)
            ignore = ("re:.*self_attn",) if split else ()
            what = recipe(kind, kv=(i + j) % 2 == 0, ignore=ignore)
            yield convert(source, folder / f"{family}-{kind}", what, 1 << 18), source


def main() -> int:
    from tiny.formats import FORMATS
    from verify_checkpoints import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        made = list(make_all(Path(folder), tuple(FAMILIES), tuple(FORMATS)))
        for good, source in made:
            assert verify(good, source).findings == (), good
        held, began = reset_peak(), time.monotonic()
        seeds = range(arguments.seed, arguments.seed + arguments.cases)
        outcome = run_cases(made, Path(folder) / "case", seeds)
        seconds = time.monotonic() - began
    for line in outcome.failed:
        print(line)
    print(f"{arguments.cases} cases over {len(made)} checkpoints in {seconds:.0f} s")
    print(f"{dict(outcome.ended)}, {len(outcome.failed)} failed")
    print(f"slowest {outcome.seconds:.2f} s, largest {outcome.growth_mb} MB for one case")
    print(f"{held} MB before all, {memory('VmRSS')} MB after")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
