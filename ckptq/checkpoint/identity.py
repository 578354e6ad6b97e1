"""Which file it is: the one that the plan was made of, from then to its last byte."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptq.errors import SourceError
from ckptq.files import reading_errors


@dataclass(frozen=True, slots=True)
class Identity:
    """What changes when another file takes the name, or somebody writes into this one.

    The time of the last change of the inode is what no tool sets back: an edit that keeps size and
    time of modification still moves it.
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


def check_same(file: Path, wanted: Identity, now: Identity) -> None:
    """SourceError where these are not the same file in the same state."""
    if now == wanted:
        return
    if now.size != wanted.size:
        what = f"it had {wanted.size:,} bytes and has {now.size:,}"
    elif (now.device, now.inode) != (wanted.device, wanted.inode):
        what = "another file has its name now"
    else:
        what = "it was written to"
    raise SourceError(
        f"{file}: changed while it was read: {what}; let whoever writes it finish, and run the "
        "command again"
    )


def lasting(folder: Path, files: Mapping[Path, Identity]) -> dict[str, list[int]]:
    """What holds from one run to the next, as JSON data; devices are numbered anew when they are
    mounted. A journal may know of times, the output may not."""
    return {
        str(file.relative_to(folder)): [found.size, found.modified, found.changed]
        for file, found in files.items()
    }


def check_unchanged(files: Mapping[Path, Identity]) -> None:
    """The same for the files that lie at these paths now."""
    for file, wanted in files.items():
        with reading_errors(file):
            now = Identity.of(os.stat(file))
        check_same(file, wanted, now)
