"""Whether a file is still the one that the plan was made from, and a run the one that was begun."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptq.checkpoint.hub.remote_file import RemoteFile
from ckptq.errors import SourceError
from ckptq.files import reading_errors


@dataclass(frozen=True, slots=True)
class Identity:
    """What changes when the file is replaced or written to.

    No tool can reset the inode's change time: an edit that keeps size and
    modification time still moves it.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    """Nanoseconds, both."""

    @staticmethod
    def of(found: os.stat_result) -> Identity:
        return Identity(
            found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        )


State = Identity | RemoteFile
"""What a file was when it was opened: on this machine, or on the hub at one commit."""


def check_same(file: Path, wanted: Identity, now: Identity) -> None:
    """SourceError unless these are the same file in the same state."""
    if now == wanted:
        return
    if now.size != wanted.size:
        what = f"its size changed from {wanted.size:,} to {now.size:,} bytes"
    elif (now.device, now.inode) != (wanted.device, wanted.inode):
        what = "it was replaced by another file"
    else:
        what = "it was written to"
    raise SourceError(
        f"{file}: changed while it was read: {what}; wait until nothing writes to it, "
        "and run the command again"
    )


def lasting(
    folder: Path, files: Mapping[Path, State], linked: Collection[Path] = ()
) -> dict[str, list[int | str]]:
    """What stays the same from one run to the next, as JSON data (device numbers change with each
    mount). Times may be in the journal, but not in the output. A run moves the change time of the
    files that it links."""
    return {
        str(file.relative_to(folder)): [found.size, found.etag]
        if isinstance(found, RemoteFile)
        else [found.size, found.modified, *([] if file in linked else [found.changed])]
        for file, found in files.items()
    }


def check_unchanged(files: Mapping[Path, State]) -> None:
    """The same for the files that are at these paths now, or on the hub."""
    for file, wanted in files.items():
        if isinstance(wanted, RemoteFile):
            wanted.check_unchanged()
            continue
        with reading_errors(file):
            now = Identity.of(os.stat(file))
        check_same(file, wanted, now)


def difference(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> str:
    """The first field in which two fingerprints differ, with both values."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old != new:
            name = f"{path}{key}"
            if isinstance(old, dict) and isinstance(new, dict):
                return difference(old, new, name + ".")
            return f"{name} was {_short(old)}, is {_short(new)}"
    return "no single field"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
