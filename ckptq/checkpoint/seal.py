"""A folder that is whole, and can prove it: digests of its files, written when all are on the disk.

For what a run keeps to go on with, and others wrote: hidden states, another tool's checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

from ckptq.checkpoint.proof import digests
from ckptq.files import json_bytes, machine_errors, sync_file, sync_folder, write_whole

SEAL = "seal.json"


def seal(folder: Path) -> None:
    """Make everything in a folder last, and then say so in it."""
    names = _names(folder)
    for name in names:
        sync_file(folder / name)
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    write_whole(folder / SEAL, json_bytes(digests(folder, names), sort_keys=True))


def is_whole(folder: Path) -> bool:
    """Whether the folder was sealed, and every file in it is as it was then."""
    file = folder / SEAL
    if not file.is_file():
        return False
    try:
        with machine_errors(file):
            wanted = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return False
    if not isinstance(wanted, dict):
        return False
    return digests(folder, map(str, wanted)) == wanted


def _names(folder: Path) -> list[str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / SEAL)
    return sorted(str(p.relative_to(folder)) for p in files)
