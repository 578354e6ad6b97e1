"""Disk and memory checks, before any data moves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.partial import partial_of
from ckptq.convert.slabs import held_bytes
from ckptq.device import find_device
from ckptq.distributed.ranks import started
from ckptq.errors import MachineError, UsageError
from ckptq.models.family import LAYER
from ckptq.plan.unit import Plan, Unit

BASE_BYTES = 700_000_000
"""The interpreter with torch, measured as 0.35 GB, and what the allocator keeps beside it."""

WORKER_BYTES = 60_000_000
"""What a thread needs at most for a block in the making: read, scratch, codes."""

SMALL_ROOMS = 256_000_000
"""As many rooms as fit here, where more than two do."""

SPARE_BYTES = 50_000_000
"""For side files, index and journal."""


def check_disk(write_bytes: int, out: Path, beside: int = 0) -> None:
    """MachineError without the space or the permission to write the output.

    `write_bytes` counts the shards, `beside` the side files. UsageError if a file is in the way.
    """
    if os.path.lexists(out):
        return  # nothing will be written: the journal decides what that means
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{parent}: is a file; expected a folder to write {out.name} in")
    _check_writable(parent)
    begun = partial_of(out) / "checkpoint"
    there = sum(f.stat().st_blocks * 512 for f in begun.rglob("*") if f.is_file())
    needed = write_bytes + beside + SPARE_BYTES - there
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise MachineError(
            f"{parent}: not enough disk space: {out.name} needs {needed:,} bytes, {free:,} are free"
        )


def _check_writable(folder: Path) -> None:
    """MachineError for a folder that takes no files: root may write anywhere, but not in /proc or
    on a disk that is mounted to be read."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MachineError(f"{folder}: no permission to write here")
    try:
        with TemporaryDirectory(prefix=".ckptq-", dir=folder):
            pass
    except OSError as error:
        raise MachineError(f"{folder}: nothing can be written here: {error.strerror}") from error


def slab_rooms(
    units: Collection[Unit], max_ram: int | None, workers: int, beside: int = 0
) -> tuple[int, int]:
    """Bytes of a room for slabs, and how many rooms there are: two, or more where they are small.

    `beside` are bytes that the program holds for more than its threads.

    UsageError if `--max-ram` is too small for one; MachineError if the machine's memory is.
    """
    largest = max(units, key=held_bytes)
    room = held_bytes(largest)
    program = BASE_BYTES + workers * WORKER_BYTES + beside
    needed = f"ckptq needs {program:,} bytes with --workers {workers}"
    if room:
        needed += f" and {room:,} more for {largest.key}"
    free = available_ram()
    if free is not None and free < program + room:
        raise MachineError(f"not enough memory: {needed}; {free:,} are available")
    if max_ram is not None and max_ram < program + room:
        raise UsageError(f"--max-ram {max_ram:,}: too small: {needed}")
    if not room:
        return 0, 0
    limits = [limit - program for limit in (free, max_ram) if limit is not None]
    return room, max(min(max(2 * room, SMALL_ROOMS), *limits) // room, 1)


def check_layers(ckpt: Checkpoint, plan: Plan, device: str | None) -> None:
    """MachineError if the calibration device cannot hold the largest decoder layer."""
    sizes: dict[str, int] = {}
    for name, stored in ckpt.tensors.items():
        match = LAYER.match(name)
        if match and match["prefix"] == plan.layout.layers:
            layer = f"{match['prefix']}.{match['index']}"
            sizes[layer] = sizes.get(layer, 0) + stored.nbytes
    if not sizes:
        return
    largest = max(sizes, key=lambda layer: sizes[layer])
    where, free = _free_on(device)
    if free is not None and sizes[largest] > free:
        raise MachineError(
            f"{where}: not enough memory to calibrate: {largest} has {sizes[largest]:,} "
            f"bytes, {free:,} are available; calibrate elsewhere and pass the file with --scales"
        )


def _free_on(device: str | None) -> tuple[str, int | None]:
    """Name of the device that calibration takes, and its free bytes."""
    chosen = find_device(device)
    if chosen.type == "cuda":
        return str(chosen), torch.cuda.mem_get_info(chosen)[0]
    return str(chosen), available_ram()


def available_ram() -> int | None:
    """Bytes still available to this process, by machine and control group; None if unknown. Ranks
    on one machine share them."""
    found = [_machine_ram(Path("/proc/meminfo")), _group_ram(Path("/sys/fs/cgroup"))]
    return min((n // started().on_host for n in found if n is not None), default=None)


def _machine_ram(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(kilobytes) * 1024 for kilobytes in found), None)


def _group_ram(group: Path) -> int | None:
    """What a container's limit leaves; cached file pages count as available."""
    try:
        limit = (group / "memory.max").read_text().strip()
        taken = int((group / "memory.current").read_text())
        statistics = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cached = sum(
        int(s.split()[1]) for s in statistics if s.split()[0] in ("active_file", "inactive_file")
    )
    return int(limit) - taken + cached
