"""The only writer of checkpoints: every tensor at its planned place, the folder in one step.

Names, shapes and offsets are known before the first byte, so a shard's header is written first and
its tensors land where they belong, in any order and from any thread. What arrives is compared
with what was promised. Layout of a file: ckptq.checkpoint.header.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64 as Digest

from ckptq.checkpoint.descriptors import Descriptors
from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import INDEX
from ckptq.checkpoint.read import Files, read_bytes, read_into
from ckptq.errors import UsageError
from ckptq.files import machine_errors, reading_errors, text_bytes, write_whole
from ckptq.spec import TensorSpec

COPY_CHUNK = 1 << 26

BUFFER = 1 << 22

BY_HAND = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO)
"""Errors of the kernel's copy after which reading and writing may work, or show what does not."""

Specs = Mapping[str, TensorSpec]

Piece = tuple[int, int, str]
"""(first byte, number of bytes, digest) of a part of a tensor."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: its shard, and its first byte there."""

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

    Reopened on the folder of an interrupted run, it keeps what is there. What went
    through memory is proved by digests (`ckptq.checkpoint.proof`), what was copied by its source.
    """

    def __init__(
        self,
        folder: Path,
        shards: Mapping[str, Specs],
        metadata: Mapping[str, str],
        *,
        finished: bool = False,
    ) -> None:
        """`finished` shards are only read: none is made or changed."""
        self.folder = folder
        self.places: dict[str, Place] = {}
        self.sizes: dict[str, int] = {}
        self._heads: dict[str, bytes] = {}
        self._arrived: dict[str, int] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._lock = threading.Lock()
        self._open = Descriptors(_open_finished if finished else _open_own)
        for shard, specs in shards.items():
            head, offsets = lay_out(specs, metadata)
            self.sizes[shard] = len(head) + sum(spec.nbytes for spec in specs.values())
            self._heads[shard] = head
            for name, offset in offsets.items():
                self.places[name] = Place(shard, offset, specs[name])
            if not finished:
                self._create(shard)

    def _create(self, shard: str) -> None:
        file = self.folder / shard
        with machine_errors(file), self._open.lease(file) as descriptor:
            os.ftruncate(descriptor, self.sizes[shard])
            write_at(descriptor, 0, memoryview(self._heads[shard]))

    def intact(self, shard: str) -> bool:
        """Whether the file exists with its size and header; says nothing about the tensors."""
        file, head = self.folder / shard, self._heads[shard]
        if file.is_symlink() or not file.is_file():
            return False
        with machine_errors(file), self._open.lease(file) as descriptor:
            size = os.fstat(descriptor).st_size
            return size == self.sizes[shard] and os.pread(descriptor, len(head), 0) == head

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of tensor `name`, from its byte `start` on."""
        with self.run(name, start) as run:
            run.write(data)

    @contextmanager
    def run(self, name: str, start: int) -> Iterator[Run]:
        """The same for consecutive chunks, which get one digest."""
        run = Run(self, name, start)
        yield run
        with self._lock:
            self._pieces.setdefault(name, []).append(run.piece())

    def put(self, name: str, start: int, data: memoryview) -> None:
        """Write without a digest; `Run` has it."""
        place = self._arrive(name, start, len(data))
        file = self.folder / place.shard
        with machine_errors(file), self._open.lease(file) as descriptor:
            write_at(descriptor, place.offset + start, data)

    def copy(self, name: str, stored: StoredTensor, files: Files, start: int, count: int) -> None:
        """Copy a stored tensor, inside the kernel if possible."""
        place = self._arrive(name, start, count)
        file = self.folder / place.shard
        with (
            files.reading(stored) as source,
            machine_errors(file),
            self._open.lease(file) as target,
        ):
            copy_bytes(stored, source, start, target, place.offset + start, count)

    def read_back(self, name: str, start: int, count: int) -> bytes:
        """What the file holds of a tensor; less if the file was cut."""
        place = self.places[name]
        file = self.folder / place.shard
        with machine_errors(file), self._open.lease(file) as descriptor:
            return os.pread(descriptor, count, place.offset + start)

    def copy_through(
        self, name: str, stored: StoredTensor, files: Files, start: int, count: int
    ) -> None:
        """The same through memory, with a digest: for a source that is removed during the run."""
        with self.run(name, start) as run:
            for at in range(start, start + count, BUFFER):
                buffer = memoryview(bytearray(min(BUFFER, start + count - at)))
                read_into(files, stored, at, buffer)
                run.write(buffer)

    def _arrive(self, name: str, start: int, count: int) -> Place:
        place = self.places[name]
        assert 0 <= start <= place.spec.nbytes - count, f"{name}: beyond its {place.spec}"
        with self._lock:
            self._arrived[name] = self._arrived.get(name, 0) + count
        return place

    def check_complete(self, names: Iterable[str]) -> None:
        """Check that every byte promised for these tensors has arrived once."""
        for name in names:
            got, want = self._arrived.get(name, 0), self.places[name].spec.nbytes
            assert got == want, f"{name}: {got} of {want} bytes arrived"

    def pieces(self, names: Iterable[str]) -> dict[str, list[Piece]]:
        """The digests of these tensors, in the order of their bytes; may be taken once."""
        with self._lock:
            return {name: sorted(self._pieces.pop(name)) for name in names if name in self._pieces}

    def sync(self, shards: Iterable[str]) -> None:
        """Wait until these files' data are on disk."""
        for shard in shards:
            file = self.folder / shard
            with machine_errors(file), self._open.lease(file) as descriptor:
                os.fsync(descriptor)

    def close(self) -> None:
        self._open.close()


class Run:
    """Consecutive bytes of one tensor, written by one thread."""

    def __init__(self, shards: Shards, name: str, start: int) -> None:
        self._shards, self._name, self._start = shards, name, start
        self._digest = Digest()
        self._count = 0

    def write(self, data: memoryview) -> None:
        """The bytes that follow."""
        self._shards.put(self._name, self._start + self._count, data)
        self._digest.update(data)
        self._count += len(data)

    def piece(self) -> Piece:
        return self._start, self._count, self._digest.hexdigest()


def _open_own(file: Path) -> int:
    """Open a file of the run, never through a symbolic or hard link to another."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise UsageError(f"{file}: is a hard link to another file; remove it and rerun the command")
    return descriptor


def _open_finished(file: Path) -> int:
    return os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def write_at(descriptor: int, at: int, data: memoryview) -> None:
    """Write all of the data from this byte of the file on."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)


def copy_bytes(
    stored: StoredTensor, source: int, start: int, target: int, at: int, count: int
) -> None:
    """Copy a range of a tensor between two open files: by the kernel, or through memory if it
    refuses, or does not say which file failed."""
    done = 0
    while done < count:
        chunk = min(COPY_CHUNK, count - done)
        first = stored.offset + start + done
        try:
            got = os.copy_file_range(source, target, chunk, first, at + done)
        except OSError as error:
            if error.errno not in BY_HAND:
                raise
            got = 0
        done += got or _copy_by_hand(stored, source, first, target, at + done, chunk)


def _copy_by_hand(
    stored: StoredTensor, source: int, first: int, target: int, at: int, count: int
) -> int:
    """Copy a part of it; SourceError if the source has ended."""
    buffer = memoryview(bytearray(min(count, BUFFER)))
    with reading_errors(stored.file):
        read_bytes(stored, source, first, buffer)
    write_at(target, at, buffer)
    return len(buffer)


def write_index(folder: Path, shards: Mapping[str, Specs], *, always: bool = False) -> list[str]:
    """Write the index of a sharded checkpoint. A single file has none, as with save_pretrained,
    unless `always`: next to other safetensors files, engines need the index to find the model's.
    Returns the names written."""
    if len(shards) == 1 and not always:
        return []
    write_whole(folder / INDEX, index_bytes(shards))
    return [INDEX]


def index_bytes(shards: Mapping[str, Specs]) -> bytes:
    """The index of these shards."""
    total = sum(spec.nbytes for specs in shards.values() for spec in specs.values())
    weight_map = {name: shard for shard, specs in shards.items() for name in specs}
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return text_bytes(json.dumps(index, indent=2) + "\n")
