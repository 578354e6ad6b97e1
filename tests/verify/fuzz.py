"""Damage of any kind, anywhere in a checkpoint: `verify` reports it or says what it cannot read.

Never a traceback, never a hang, never memory beyond a bound. By hand, in numbers:
`python tests/verify/fuzz.py --cases 10000`. The default run of the tests does a few hundred.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ckptq.errors import CkptqError
from ckptq.verify.run import verify

SECONDS = 30
"""A checkpoint this small is read in a tenth of a second."""

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 1 << 40, -(1 << 70), 1e308, "", "x", "re:(", "re:.*", "Linear", [], {},
    [[]], [None], {"a": {}}, "\ud800".encode("utf-8", "replace").decode(), "float", "channel", 128,
)  # fmt: skip


class TooSlow(BaseException):
    """No error that a check might catch by mistake."""


def flip_bytes(rng: random.Random, folder: Path) -> None:
    """A few bytes of one file."""
    file = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
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
    file = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data) + 1)])


def edit_json(rng: random.Random, folder: Path) -> None:
    """One value of config.json or of the index becomes something else, or goes."""
    file = rng.choice(sorted(folder.glob("*.json")))
    value = json.loads(file.read_text())
    places = list(_places(value))
    if not places:
        return
    container, key = rng.choice(places)
    if rng.random() < 0.2:
        del container[key]
    else:
        container[key] = rng.choice(JUNK)
    file.write_text(json.dumps(value))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def exchange_files(rng: random.Random, folder: Path) -> None:
    a, b = rng.sample(sorted(p for p in folder.iterdir() if p.is_file()), 2)
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)


def lose_a_file(rng: random.Random, folder: Path) -> None:
    file = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
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
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        report = verify(scratch, source if rng.random() < 0.7 else None, fast=rng.random() < 0.3)
        json.dumps(report.to_dict(), allow_nan=False)
        return "found" if report.findings else "no finding"
    except CkptqError as error:
        if not str(error):
            raise RuntimeError(f"{type(error).__name__} without a message") from error
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def alarmed(*_: object) -> None:
    raise TooSlow(f"took more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from verify_checkpoints import FAMILIES, convert, recipe, save_source

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, alarmed)
    ended: Counter[str] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for family, weights in zip(
            FAMILIES, ("fp8-channel", "int4-asym", "int4", "nvfp4"), strict=True
        ):
            source = save_source(family, Path(folder) / f"{family}-source")
            ignore = ("re:.*self_attn",) if "asym" in weights else ()
            what = recipe(weights, kv=True, ignore=ignore)
            made.append((convert(source, Path(folder) / family, what, 1 << 18), source))
        before, began = _peak(), time.monotonic()
        for case in range(arguments.cases):
            good, source = made[case % len(made)]
            seed = arguments.seed + case
            try:
                ended[run_case(good, source, Path(folder) / "case", seed)] += 1
            except BaseException as error:  # what must not happen is what is looked for
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                print(f"seed {seed}, {good.name}: {type(error).__name__}: {error}", flush=True)
        seconds = time.monotonic() - began
    print(f"{arguments.cases} cases in {seconds:.0f} s: {dict(ended)}, {failed} failed")
    print(f"peak memory {before} MB before, {_peak()} MB after")
    return 1 if failed else 0


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    sys.exit(main())
