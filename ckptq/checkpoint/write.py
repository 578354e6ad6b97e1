"""The one door out: shards with every tensor at its planned place, and a folder that appears whole.

Names, shapes and offsets are known before the first byte, so a shard's header is written first and
its tensors land where they belong, in any order and from any thread. What arrives is held against
what was promised. Layout of a file: ckptq.checkpoint.header.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint.open import INDEX
from ckptq.errors import MachineError
from ckptq.spec import TensorSpec

COPY_CHUNK = 1 << 26

Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: its shard and its first byte there."""

    shard: str
    offset: int
    spec: TensorSpec


def lay_out(specs: Specs, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A shard's header bytes, and each tensor's offset from the start of the file.

    Wide elements first, so that every tensor is aligned to its element size, as the safetensors
    library writes them; in the given order otherwise.
    """
    ordered = sorted(specs, key=lambda name: -specs[name].itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, at = {}, 0
    for name in ordered:
        spec = specs[name]
        starts[name] = at
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


class Shards:
    """The output's safetensors files while they are being filled.

    Opened anew on a folder that an interrupted run left behind, it keeps what is there.
    """

    def __init__(
        self, folder: Path, shards: Mapping[str, Specs], metadata: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.places: dict[str, Place] = {}
        self._arrived: dict[str, int] = {}
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        for shard, specs in shards.items():
            head, offsets = lay_out(specs, metadata)
            size = len(head) + sum(spec.nbytes for spec in specs.values())
            self._files[shard] = self._create(folder / shard, head, size)
            for name, offset in offsets.items():
                self.places[name] = Place(shard, offset, specs[name])

    def _create(self, file: Path, head: bytes, size: int) -> int:
        with machine_errors(file):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, head, 0)
        return descriptor

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Bytes of tensor `name` from its byte `start` on."""
        place = self._arrive(name, start, len(data))
        done = 0
        with machine_errors(self.folder / place.shard):
            while done < len(data):
                at = place.offset + start + done
                done += os.pwrite(self._files[place.shard], data[done:], at)

    def copy(self, name: str, start: int, source: int, offset: int, count: int) -> None:
        """The same from an open file, inside the kernel where it can."""
        place = self._arrive(name, start, count)
        with machine_errors(self.folder / place.shard):
            copy_bytes(source, offset, self._files[place.shard], place.offset + start, count)

    def _arrive(self, name: str, start: int, count: int) -> Place:
        place = self.places[name]
        assert 0 <= start <= place.spec.nbytes - count, f"{name}: beyond its {place.spec}"
        with self._lock:
            self._arrived[name] = self._arrived.get(name, 0) + count
        return place

    def check_complete(self, names: Iterable[str]) -> None:
        """Every byte that was promised for these tensors has arrived once."""
        for name in names:
            got, want = self._arrived.get(name, 0), self.places[name].spec.nbytes
            assert got == want, f"{name}: {got} of {want} bytes arrived"

    def sync(self, shards: Iterable[str]) -> None:
        """Wait until these files' data are on the disk."""
        for shard in shards:
            with machine_errors(self.folder / shard):
                os.fsync(self._files[shard])

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class machine_errors:
    """Turn what the operating system refuses into a MachineError that names the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "; free some space and run the same command again" if full else ""
            raise MachineError(f"{self.file}: {error.strerror or error}{advice}") from error


def copy_bytes(source: int, offset: int, target: int, at: int, count: int) -> None:
    """Copy a range between two open files; by the kernel, or through memory if it refuses."""
    done = 0
    while done < count:
        chunk = min(COPY_CHUNK, count - done)
        try:
            got = os.copy_file_range(source, target, chunk, offset + done, at + done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            got = os.pwrite(target, os.pread(source, min(chunk, 1 << 22), offset + done), at + done)
        if got == 0:
            raise OSError(errno.EIO, "the source file ended early: it changed while it was read")
        done += got


def write_index(folder: Path, shards: Mapping[str, Specs]) -> None:
    """The index of a sharded checkpoint; a single file has none, as with save_pretrained."""
    if len(shards) == 1:
        return
    total = sum(spec.nbytes for specs in shards.values() for spec in specs.values())
    weight_map = {name: shard for shard, specs in shards.items() for name in specs}
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """A small file, whole and on the disk."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    with machine_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; their contents are synced one by one."""
    with machine_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
