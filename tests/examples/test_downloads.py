"""What comes out of an archive is what was expected, or is refused."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from downloads import Package

CONTENT = b"Call me Ishmael."
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def archive(folder: Path, name: str, content: bytes = CONTENT) -> Package:
    """A package whose archive lies in `folder` already: pip is not asked."""
    if name.endswith(".whl"):
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr("moby/dick.txt", content)
    else:
        with tarfile.open(folder / name, "w:gz") as source:
            member = tarfile.TarInfo("moby/dick.txt")
            member.size = len(content)
            source.addfile(member, io.BytesIO(content))
    return Package("moby==1.0", name, {"moby/dick.txt": DIGEST})


@pytest.mark.parametrize("name", ["moby-1.0-py3-none-any.whl", "moby-1.0.tar.gz"])
def test_files_are_read_from_wheels_and_source_packages(tmp_path, name):
    assert archive(tmp_path, name).read(tmp_path) == [CONTENT]


@pytest.mark.parametrize("name", ["moby-1.0-py3-none-any.whl", "moby-1.0.tar.gz"])
def test_other_bytes_are_refused(tmp_path, name):
    package = archive(tmp_path, name, CONTENT.replace(b"Ishmael", b"Izhmael"))
    with pytest.raises(ValueError, match=rf"{name}: moby/dick.txt has the sha256 .*, wanted"):
        package.read(tmp_path)
