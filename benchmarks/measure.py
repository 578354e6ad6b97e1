"""Run a command and say what it took. Keep whoever imports this small: no torch.

A child starts with its parent's peak as its own (Linux carries it over fork and exec), so that a
large process cannot measure small ones.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """Wall clock, CPU time of all threads, and the largest resident set."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(command: Sequence[str | Path], sync: Path | None = None) -> Took:
    """Wait for the command, and for the file system of `sync`; CalledProcessError if it failed."""
    began = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code:
        raise subprocess.CalledProcessError(code, process.args)
    if sync is not None:
        subprocess.run(["sync", "-f", sync], check=True)
    return Took(
        seconds=time.perf_counter() - began,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def warm(folder: Path) -> None:
    """Read all files, so that they are in the page cache as far as they fit."""
    buffer = bytearray(1 << 24)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as handle:
                while handle.readinto(buffer):
                    pass


def machine() -> str:
    """What a result was measured on: "amd-epyc-2-cores"."""
    found = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            found = line.partition(":")[2].strip()
            break
    name = re.sub(
        "[^a-z0-9]+", "-", found.lower().replace("(r)", "").replace("processor", "")
    ).strip("-")
    return f"{name}-{len(os.sched_getaffinity(0))}-cores"


def load() -> float:
    """Processes that wanted to run over the last minute; more than there are cores is a crowd."""
    return os.getloadavg()[0]
