"""Small files, written atomically; operating system errors as messages.

A file that is read later appears by one rename, when its bytes are on the disk: beside it, under a
name that no other file has, then synced, renamed, and the folder synced. A process that is killed
leaves what was there before, and perhaps a file that ends in `UNFINISHED`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptq.errors import CkptqError, MachineError, SourceError, UsageError

UNFINISHED = ".ckptq-unfinished"
"""Suffix of a file that is being written."""

FULL = (errno.ENOSPC, errno.EDQUOT)

FAILING = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
"""What reading ends in where the machine is the cause, not the file."""

CHUNK = 1 << 22

RENAME_NOREPLACE = 1
AT_FDCWD = -100
FICLONE = 0x40049409


@contextmanager
def machine_errors(file: Path) -> Iterator[None]:
    """Turn OSError into a MachineError that names the file."""
    try:
        yield
    except OSError as error:
        full = error.errno in FULL
        advice = "; free some space and rerun the same command" if full else ""
        raise MachineError(f"{file}: {error.strerror or error}{advice}") from error


@contextmanager
def reading_errors(file: Path) -> Iterator[None]:
    """The same for reading a user's file: a SourceError, unless the machine failed."""
    try:
        yield
    except OSError as error:
        made: type[CkptqError] = MachineError if error.errno in FAILING else SourceError
        raise made(f"{file}: cannot be read: {error.strerror or error}") from error


def write_whole(
    file: Path,
    data: bytes | Iterable[bytes],
    beside: Path | None = None,
    *,
    replace: bool = True,
) -> None:
    """Put a small file in its place, whole and on the disk; what was there before is replaced.

    `beside` is the folder in which it is made, on the same file system; its own by default.
    MachineError names the file that could not be written, or, without `replace`, one that is there.
    A device or a pipe is written to.
    """
    target = file.resolve() if file.is_symlink() else file
    with machine_errors(file):
        if target.exists() and not target.is_file():
            with target.open("wb") as handle:
                _write(handle.fileno(), data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = beside if beside is not None and target == file else target.parent
        scratch = folder / f".{secrets.token_hex(6)}{UNFINISHED}"
        try:
            _write_new(scratch, data)
            (os.replace if replace else rename_new)(scratch, target)
        except BaseException:
            with suppress(OSError):
                scratch.unlink()
            raise
    sync_folder(target.parent)


def _write_new(file: Path, data: bytes | Iterable[bytes]) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes | Iterable[bytes]) -> None:
    for chunk in (data,) if isinstance(data, bytes) else data:
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def take_whole(source: Path, target: Path) -> None:
    """The same file again under another name: as a clone that shares its blocks until one of the
    two is written to, as a hard link where the file system has no clones, as a copy where it has
    neither. What was at `target` is replaced."""
    with machine_errors(target):
        target.unlink(missing_ok=True)
        if not _cloned(source, target):
            try:
                os.link(source.resolve(), target)
            except OSError:
                shutil.copyfile(source, target)
                sync_file(target)


def _cloned(source: Path, target: Path) -> bool:
    with source.open("rb") as ours, target.open("xb") as theirs:
        try:
            fcntl.ioctl(theirs.fileno(), FICLONE, ours.fileno())
            os.fsync(theirs.fileno())
            return True
        except OSError:
            target.unlink()
            return False


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes have left of files that they were writing in here."""
    with machine_errors(folder):
        for file in folder.rglob(f".*{UNFINISHED}"):
            file.unlink()


def text_bytes(text: str) -> bytes:
    """UTF-8. Half of a surrogate pair, which has no bytes in it, becomes the escape \\udXXX."""
    return text.encode("utf-8", "backslashreplace")


def json_bytes(value: object, *, sort_keys: bool = False) -> bytes:
    """JSON as people read it. Half of a surrogate pair is the same JSON again, as an escape."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    return text_bytes(text + "\n")


def sync_file(file: Path) -> None:
    """Wait until what somebody else has written into a file is on the disk."""
    _sync(file, os.O_RDONLY | os.O_NOFOLLOW)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; their contents are synced one by one."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    with machine_errors(path):
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename_new(source: Path, target: Path) -> None:
    """Rename, to a name that nothing has: FileExistsError where something does.

    A plain rename replaces an empty folder, and a look before it is no promise. Where the file
    system cannot promise it either, the look has to do.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc since 2.28
    if call is not None:
        if not call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE):
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def chunks_of(descriptor: int) -> Iterator[bytes]:
    """What is left of an open file, a few megabytes at a time."""
    while chunk := os.read(descriptor, CHUNK):
        yield chunk


def read_small(file: Path, limit: int) -> bytes:
    """A file that the user names, also a pipe: UsageError for one of more than `limit` bytes."""
    try:
        with file.open("rb") as handle:
            data = handle.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise UsageError(f"{file}: more than {limit:,} bytes; not a file of this kind")
    return data
