"""What the machine has to offer, asked before the first byte moves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ckptq.checkpoint.journal import partial_of
from ckptq.convert.pipeline import BLOCK_ELEMENTS, held_bytes
from ckptq.errors import MachineError, UsageError
from ckptq.plan.unit import Plan

BASE_BYTES = 700_000_000
"""The interpreter with torch, measured as 0.35 GB, and what the allocator keeps beside it."""

SPARE_BYTES = 50_000_000
"""For side files, index and journal."""


def check_disk(plan: Plan, out: Path) -> None:
    """Room for what is still to be written, and the right to write it."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{parent}: no permission to write here")
    scratch = partial_of(out)
    there = sum(f.stat().st_blocks * 512 for f in scratch.rglob("*") if f.is_file())
    needed = plan.write_bytes + SPARE_BYTES - there
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise MachineError(
            f"{parent}: too little disk: {out.name} needs {needed:,} bytes, {free:,} are free"
        )


def slab_budget(plan: Plan, max_ram: int | None, workers: int) -> int:
    """Bytes that slabs may take together: twice the largest one, or what `--max-ram` leaves.

    UsageError where even the largest unit alone does not fit the ceiling.
    """
    largest = max(plan.units, key=held_bytes)
    wanted = max(2 * held_bytes(largest), 1 << 28)
    if max_ram is None:
        return wanted
    scratch = workers * BLOCK_ELEMENTS * 16
    room = max_ram - BASE_BYTES - scratch
    if room < held_bytes(largest):
        raise UsageError(
            f"--max-ram {max_ram:,}: too small: {largest.key} alone needs "
            f"{held_bytes(largest):,} bytes beside {BASE_BYTES + scratch:,} for the program"
        )
    return min(wanted, room)
