"""Small files are whole or not there, and what the system refuses names the file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptq import files
from ckptq.errors import MachineError, SourceError, UsageError
from ckptq.files import (
    json_bytes,
    read_small,
    reading_errors,
    rename_new,
    take_whole,
    write_whole,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "scales"


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(file):
    file.write_bytes(b"old")
    write_whole(file, (b"ne", b"", b"w"))
    assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["scales"]


def test_anybody_may_read_it_as_the_umask_lets_them(file):
    file.with_name("like").touch()
    write_whole(file, b"x")
    assert file.stat().st_mode == file.with_name("like").stat().st_mode


def test_bytes_names_and_the_folder_are_on_the_disk_in_this_order(file, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("folder" if path == file.parent else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write_whole(file, b"x")
    assert done == ["file", "rename", "folder"]


def failing():
    yield b"half"
    raise RuntimeError("no more")


def test_what_fails_leaves_the_old_file_and_no_litter(file):
    file.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write_whole(file, failing())
    assert file.read_bytes() == b"old"
    assert os.listdir(file.parent) == ["scales"]


KILLED = """
import os, signal, sys
from pathlib import Path
from ckptq.files import write_whole
def data():
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), data())
"""


def test_killed_while_it_writes_it_leaves_the_old_file(file):
    file.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert file.read_bytes() == b"old"
    litter = [p for p in file.parent.iterdir() if p != file]
    assert [p.name.endswith(files.UNFINISHED) for p in litter] == [True]
    files.clear_unfinished(file.parent)
    assert os.listdir(file.parent) == ["scales"]


def test_a_full_disk_names_the_file(tmp_path, file):
    """Really full: no file of this process may have more than 4 bytes."""
    script = (
        "import resource, sys; from pathlib import Path; from ckptq.files import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))\n"
        "write_whole(Path(sys.argv[1]), b'12345')"
    )
    file.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False
    )
    assert f"MachineError: {file}: File too large" in done.stderr
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["scales"]


def test_a_link_leads_to_the_file_that_is_replaced(file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real"
    target.write_bytes(b"old")
    file.symlink_to(target)
    write_whole(file, b"new")
    assert file.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_device_is_written_to_and_stays_a_device(tmp_path):
    write_whole(Path("/dev/null"), b"x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(MachineError, match=r"/dev/full: No space left.*free some space"):
        write_whole(Path("/dev/full"), b"x")


@pytest.mark.parametrize("native", [True, False], ids=["by the kernel", "by a look"])
@pytest.mark.parametrize("there", ["nothing", "file", "folder", "empty folder", "dead link"])
def test_a_rename_replaces_nothing(tmp_path, monkeypatch, there, native):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "in").mkdir(parents=True)
    if there == "file":
        target.write_text("x")
    elif there == "dead link":
        target.symlink_to("nowhere")
    elif there != "nothing":
        target.mkdir()
        if there == "folder":
            (target / "x").touch()
    if not native:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    if there == "nothing":
        rename_new(source, target)
        assert (target / "in").is_dir()
    else:
        with pytest.raises(FileExistsError):
            rename_new(source, target)
        assert (source / "in").is_dir()
        assert not (target / "in").exists()


def test_half_a_surrogate_pair_is_the_same_json_again():
    value = {"note": "\ud800", "b\udc00": ["ä", "\U0001f600"]}
    data = json_bytes(value)
    assert json.loads(data) == value
    assert "ä".encode() in data


def test_a_machine_that_fails_is_no_wrong_file(file):
    failed = pytest.raises(MachineError, match=r"scales: cannot be read: Input/output error")
    with failed, reading_errors(file):
        raise OSError(5, os.strerror(5))
    refused = pytest.raises(SourceError, match=r"scales: cannot be read: Permission denied")
    with refused, reading_errors(file):
        raise OSError(13, os.strerror(13))


def test_a_small_file_may_be_a_pipe_and_has_an_end(file):
    os.mkfifo(file)
    writer = subprocess.Popen(["sh", "-c", f"echo recipe > {file}"])
    assert read_small(file, 100) == b"recipe\n"
    writer.wait()
    with pytest.raises(UsageError, match="more than 100 bytes"):
        read_small(Path("/dev/zero"), 100)


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_is_taken_whole_even_where_nothing_can_be_linked(file, monkeypatch, linked):
    """A copy is another file; a link is not, and a clone only shares its blocks."""
    file.write_bytes(b"weights")
    target = file.with_name("taken")
    target.write_bytes(b"half of them, and more than there are")

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not linked:
        monkeypatch.setattr("ckptq.files.os.link", refuse)
    take_whole(file, target)
    assert target.read_bytes() == b"weights"
    if not linked:
        assert not target.samefile(file)
