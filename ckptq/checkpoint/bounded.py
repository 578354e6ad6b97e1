"""Untrusted files, read within bounds: regular files only, and JSON that fits in memory.

A number that a file gives is checked before anything is allocated for it. Parsed JSON takes up to
a hundred times its bytes (`[[],[],...]`), so its values are counted before it is parsed.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptq.checkpoint.identity import Identity
from ckptq.errors import SourceError
from ckptq.files import CHUNK, reading_errors

CONFIG_BYTES = 1 << 24
"""Of config.json. The largest known ones ignore 50,000 Linears, in 4 MB."""

INDEX_BYTES = 1 << 27
"""Of an index: a million tensors."""

TOKENIZER_BYTES = 1 << 28
"""Of tokenizer.json. The largest have 40 MB."""

CONFIG_VALUES = 1 << 20
INDEX_VALUES = 1 << 21

SMALL = 1 << 20
"""Bytes of JSON that take little memory whatever they hold."""

ESCAPE = re.compile(rb"\\.", re.DOTALL)

Pairs = list[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Opened:
    """A regular file, open for reading."""

    file: Path
    descriptor: int
    identity: Identity

    def read(self, start: int, count: int) -> bytes:
        """These bytes, fewer if the file ends."""
        with reading_errors(self.file):
            parts = []
            while count and (got := os.pread(self.descriptor, count, start)):
                parts.append(got)
                start, count = start + len(got), count - len(got)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def chunks(self) -> Iterator[bytes]:
        """All bytes, a few megabytes at a time."""
        start = 0
        while chunk := self.read(start, CHUNK):
            yield chunk
            start += len(chunk)


@contextmanager
def opened(file: Path) -> Iterator[Opened]:
    """The file; SourceError for a folder, a device or a pipe, which may never end."""
    with reading_errors(file):
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SourceError(f"{file}: is {kind_of(found.st_mode)}, expected a file")
        yield Opened(file, descriptor, Identity.of(found))
    finally:
        os.close(descriptor)


def kind_of(mode: int) -> str:
    """What is there instead of a regular file, in words."""
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def read_bounded(file: Path, limit: int) -> tuple[bytes, Identity]:
    """All bytes of a small file; SourceError for more than `limit` of them."""
    with opened(file) as found:
        data = found.read(0, limit + 1)
        if len(data) > limit:
            raise SourceError(
                f"{file}: {found.identity.size:,} bytes; {file.name} may have up to {limit:,}"
            )
        return data, found.identity


def json_object(
    file: Path, limit: int = CONFIG_BYTES, values: int = CONFIG_VALUES
) -> tuple[dict[str, Any], Identity]:
    """A small file that holds a JSON object."""
    data, identity = read_bounded(file, limit)
    check_values(file, data, values)
    value = parse(str(file), data)
    if not isinstance(value, dict):
        raise SourceError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value, identity


def parse(where: str, data: bytes, hook: Callable[[Pairs], Any] | None = None) -> Any:
    """JSON in UTF-8; SourceError, "WHERE: not valid JSON: why", for anything else."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not valid JSON: {str(error)[:200]}") from error


def check_values(file: Path, data: bytes, limit: int) -> None:
    """SourceError for JSON with more than about `limit` values in it."""
    if len(data) > SMALL:
        lists, objects, commas = count_values(data)
        if lists + objects + commas > limit:
            raise SourceError(
                f"{file}: holds {lists + objects + commas:,} values; {file.name} may have up to "
                f"{limit:,}"
            )


def count_values(data: bytes) -> tuple[int, int, int]:
    """How many lists and objects JSON opens, and how many commas it has, outside of strings."""
    import numpy as np

    counts = np.zeros(3, dtype=np.int64)
    inside = 0
    for chunk in _unescaped(data):
        letters = np.frombuffer(chunk, dtype=np.uint8)
        quotes = np.cumsum(letters == ord('"'), dtype=np.uint32) + inside
        bare = letters[(quotes & 1) == 0]
        counts += [int((bare == ord(letter)).sum()) for letter in "[{,"]
        inside = int(quotes[-1]) & 1
    lists, objects, commas = (int(count) for count in counts)
    return lists, objects, commas


def _unescaped(data: bytes) -> Iterator[bytes]:
    """The data in chunks, in which every quote begins or ends a string."""
    start = 0
    while start < len(data):
        stop = start + SMALL
        chunk = data[start:stop]
        if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:  # what it escapes belongs to it
            stop += 1
            chunk = data[start:stop]
        yield ESCAPE.sub(b"..", chunk) if b"\\" in chunk else chunk
        start = stop
