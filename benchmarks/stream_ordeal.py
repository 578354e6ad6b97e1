"""A source larger than the free disk, streamed from a hub on this machine, cut off and killed.

    python benchmarks/stream_ordeal.py FOLDER --out SMALL/out --kills 20

Makes a source with the layers of an 8B Llama and a small vocabulary, serves it on this machine
(tests/convert/hub_server.py) with links that expire and connections that break, and converts it
with `ckptq quantize --stream`, killed (SIGKILL) again and again. The result must equal a local
conversion's. OUT may be on another file system, of limited size: `--out`. Prints how many bytes
the cache held at most: none of the source's shards may be there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "convert"))

from hub_server import MODEL, Faults, Hub  # noqa: E402
from make_synthetic import SHAPES, make  # noqa: E402

ABOUT = ("ckptq.json", "README.md")
SCHEME = "fp8-dynamic"
APART = 380_000_000
"""Bytes asked for between two kills, with a little more each time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="where the result goes; default: FOLDER/out")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--kills", type=int, default=20)
    asked = parser.parse_args()
    source, local = asked.folder / "source", asked.folder / "local"
    if not source.exists():
        make(source, replace(SHAPES["llama-8b"], layers=asked.layers, vocab=8000))
    if not local.exists():
        subprocess.run(command(source, local), check=True)
    wanted = digests(local)
    size = sum(file.stat().st_size for file in source.iterdir())
    out = asked.out or asked.folder / "out"
    free = shutil.disk_usage(out.parent).free
    print(f"source {size:,} bytes, free where the result goes {free:,}")

    hub = Hub(source).start()
    cache = asked.folder / "cache"
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache)}
    cut = Faults(cut_after=5_000_000, cuts=1 << 30, link_lasts=40)
    killed = 0
    most = [0]
    threading.Thread(target=watch, args=(cache, most), daemon=True).start()
    for number in range(asked.kills):
        hub.faults = cut
        target = asked_for(hub) + APART + number * 7_654_321
        run = subprocess.Popen([*command(MODEL, out), "--stream"], env=environment)
        while run.poll() is None and asked_for(hub) < target:
            time.sleep(0.02)
        if run.poll() is None:
            run.kill()
            run.wait()
            killed += 1
            print(f"killed {killed} times, asked for {asked_for(hub):,} bytes", flush=True)
        elif out.exists():  # it went through: from the beginning again
            print(f"through, bytes equal: {digests(out) == wanted}", flush=True)
            shutil.rmtree(out)
    run = subprocess.Popen([*command(MODEL, out), "--stream"], env=environment)
    _, status, usage = os.wait4(run.pid, 0)
    fetched = asked_for(hub)
    found = digests(out)
    equal = found == wanted
    print(
        f"exit {os.waitstatus_to_exitcode(status)}, killed {killed} times, asked for {fetched:,} "
        f"bytes in {len(hub.ranges):,} requests; most in the cache {most[0]:,} bytes; peak memory "
        f"{usage.ru_maxrss * 1024:,}; bytes equal: {equal}"
    )
    sys.exit(0 if equal and killed else 1)


def asked_for(hub: Hub) -> int:
    return sum(stop - start for _, start, stop in list(hub.ranges))


def command(model: str | Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "ckptq", "quantize", str(model), "-s", SCHEME, "-o", str(out)]


def watch(folder: Path, most: list[int]) -> None:
    """The most bytes that were in the folder."""
    while True:
        files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        held = 0
        for file in files:
            try:
                held += file.stat().st_size
            except OSError:
                continue
        most[0] = max(most[0], held)
        time.sleep(0.2)


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in ABOUT:
            with file.open("rb") as handle:
                found[str(file.relative_to(folder))] = hashlib.file_digest(
                    handle, "sha256"
                ).hexdigest()
    return found


if __name__ == "__main__":
    main()
