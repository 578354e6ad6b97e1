"""Proof that what a run wrote is still there, byte for byte, before anything of it is trusted.

A crashed machine can leave zeros where the journal says that a unit is done, and a shard can
be cut or lost. So bytes that went through memory have a digest, taken while they were in the
processor's cache (xxh3: 50 GB/s on one core, where sha256 takes 2 and crc32 4; damage is to be
found, not an adversary kept out). Bytes that the kernel copied are compared with their source,
which is still the same file (`ckptq.checkpoint.identity`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_into
from ckptq.checkpoint.write import Digest, Shards
from ckptq.files import chunks_of, machine_errors

BUFFER = 1 << 22

Pieces = Mapping[str, Sequence[Any]]
"""Tensor -> its pieces in order, as a journal holds them; a tensor that was copied has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What proves a unit of work."""

    key: str
    tensors: tuple[str, ...]
    copies: Mapping[str, StoredTensor] = field(default_factory=dict)
    """The tensors that are copies, and what they are copies of."""


def proven(promise: Promise, pieces: Pieces, shards: Shards, files: Files) -> bool:
    """Whether every tensor of the unit is in the shards as it was written."""
    return isinstance(pieces, Mapping) and all(
        same_as_source(shards, name, promise.copies[name], files)
        if name in promise.copies
        else as_recorded(shards, name, pieces.get(name, ()))
        for name in promise.tensors
    )


def proven_keys(
    promises: Iterable[Promise],
    done: Mapping[str, Pieces],
    shards: Shards,
    files: Files,
    pool: ThreadPoolExecutor,
) -> set[str]:
    """Those units that the journal calls done and the shards prove."""
    asked = [promise for promise in promises if promise.key in done]
    answers = pool.map(lambda p: proven(p, done[p.key], shards, files), asked)
    return {promise.key for promise, true in zip(asked, answers, strict=True) if true}


def as_recorded(shards: Shards, name: str, pieces: Sequence[Any]) -> bool:
    """Whether the tensor's bytes have these digests, and all of them have one."""
    at = 0
    for piece in pieces if isinstance(pieces, list | tuple) else ():
        if not _is_piece(piece) or piece[0] != at:
            return False
        start, count, wanted = piece
        if at + count > shards.places[name].spec.nbytes:
            return False
        found = Digest()
        while at < start + count:
            chunk = shards.read_back(name, at, min(BUFFER, start + count - at))
            found.update(chunk)
            at += len(chunk)
            if not chunk:
                return False  # cut off
        if found.hexdigest() != wanted:
            return False
    return at == shards.places[name].spec.nbytes


def same_as_source(shards: Shards, name: str, stored: StoredTensor, files: Files) -> bool:
    """Whether the tensor's bytes are those of the stored one."""
    for at in range(0, stored.nbytes, BUFFER):
        wanted = memoryview(bytearray(min(BUFFER, stored.nbytes - at)))
        read_into(files, stored, at, wanted)
        if shards.read_back(name, at, len(wanted)) != wanted:
            return False
    return True


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digest of each existing file, by the names given."""
    found = {}
    for name in sorted(names):
        file = folder / name
        if file.is_symlink() or not file.is_file():
            continue
        digest = Digest()
        with machine_errors(file), file.open("rb") as handle:
            for chunk in chunks_of(handle.fileno()):
                digest.update(chunk)
        found[name] = f"{os.stat(file).st_size}:{digest.hexdigest()}"
    return found


def same_bytes(file: Path, source: Path) -> bool:
    """Whether a shard that was taken whole is its source: the same file, or one equal to it."""
    with machine_errors(file):
        if file.samefile(source):
            return True
        if file.stat().st_size != source.stat().st_size:
            return False
    with machine_errors(file), file.open("rb") as ours, source.open("rb") as theirs:
        chunks = zip(chunks_of(ours.fileno()), chunks_of(theirs.fileno()), strict=True)
        return all(mine == yours for mine, yours in chunks)


def _is_piece(value: object) -> bool:
    """A journal is a file, and can contain anything."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(type(n) is int and n >= 0 for n in value[:2])
    )
