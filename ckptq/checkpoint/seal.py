"""A folder that can prove it is complete: digests of its files, written once all are on disk.

For what a run keeps in order to resume: hidden states, another tool's checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

from ckptq.checkpoint.proof import digests
from ckptq.files import json_bytes, machine_errors, sync_file, sync_folder, write_whole

SEAL = "seal.json"


def seal(folder: Path) -> None:
    """Sync everything in a folder, then write its digests."""
    names = _names(folder)
    for name in names:
        sync_file(folder / name)
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    write_whole(folder / SEAL, json_bytes(digests(folder, names), sort_keys=True))


def is_whole(folder: Path) -> bool:
    """Whether the folder was sealed and no file has changed since."""
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
