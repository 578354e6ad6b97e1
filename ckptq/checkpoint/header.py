"""Parse a safetensors header, trusting nothing in it: bounds first, then bytes.

A file is: u64 little-endian length of a JSON object, the object, then the tensors' bytes without
gaps (huggingface/safetensors README). Errors name the file and the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ckptq.checkpoint.bounded import SMALL, Opened, Pairs, count_values, opened, parse
from ckptq.checkpoint.hub.remote_file import RemoteFile
from ckptq.checkpoint.identity import State
from ckptq.errors import SourceError
from ckptq.spec import DTYPES, TensorSpec

MAX_HEADER = 100_000_000
"""The safetensors library's own limit, in bytes."""

MAX_TENSORS = 1 << 18
"""In one file; the largest known has 50,000."""

MAX_AXES = 64
"""As many as torch takes."""

MAX_NAME = 4096
"""Characters of a tensor's name."""

MAX_LABELS = 100_000
"""Entries of `__metadata__`."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies on disk. `offset` counts from the start of the file."""

    name: str
    spec: TensorSpec
    file: Path
    offset: int
    identity: State | None = field(default=None, compare=False, repr=False)
    """Of the file when its header was read; None for a tensor that is in no file."""

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one safetensors file."""

    file: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    nbytes: int
    digest: str
    """sha256 of the header's bytes: changes when any name, shape, dtype or place changes."""
    identity: State


def by_place(header: Header) -> list[StoredTensor]:
    """The tensors in the order of their bytes."""
    return sorted(header.tensors.values(), key=lambda t: t.offset)


class _Entry(NamedTuple):
    """The fields of a tensor, not checked yet."""

    dtype: Any
    shape: Any
    offsets: Any


def read_header(file: Path) -> Header:
    """Read and check the header of `file`; reads no tensor data.

    Raises SourceError for a truncated file, a header that is not a JSON object, unknown dtypes,
    shapes that do not fit their byte range, ranges that overlap, leave gaps or leave the file, and
    for more tensors, axes or characters than any checkpoint has.
    """
    with opened(file) as found:
        return header_of(found)


def header_of(found: Opened | RemoteFile) -> Header:
    """The same for a file that is open, here or on the hub."""
    file, size = found.file, found.identity.size
    raw = _header_bytes(found)
    entries = _parse(file, raw)
    metadata = _metadata(file, entries.pop("__metadata__", {}))
    start = 8 + len(raw)
    stored = {name: _stored(found, name, value, start, size) for name, value in _drained(entries)}
    _check_ranges(file, stored, start, size)
    return Header(file, stored, metadata, size, hashlib.sha256(raw).hexdigest(), found.identity)


def _drained(entries: dict[str, Any]) -> Any:
    """The items in order; each is released when the next is requested."""
    for name in list(entries):
        yield name, entries.pop(name)


def _header_bytes(found: Opened | RemoteFile) -> bytes:
    file, size = found.file, found.identity.size
    first = found.read(0, 8)
    if len(first) < 8:
        raise SourceError(f"{file}: truncated: {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise SourceError(
            f"{file}: not a safetensors file, or corrupt: its header claims {length} bytes, "
            f"more than the limit of {MAX_HEADER}"
        )
    if length > size - 8:
        raise SourceError(
            f"{file}: truncated: the header claims {length} bytes, the file has {size}"
        )
    raw = found.read(8, length)
    if len(raw) != length:
        raise SourceError(f"{file}: truncated: the header has {len(raw)} of {length} bytes")
    return raw


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    _check_counts(file, raw)
    parsed = parse(f"{file}: the header", raw, _compact)
    if not isinstance(parsed, dict):
        kind = "dict" if isinstance(parsed, _Entry) else type(parsed).__name__
        raise SourceError(f"{file}: the header is a JSON {kind}, expected an object of tensors")
    return parsed


def _check_counts(file: Path, raw: bytes) -> None:
    """SourceError for a header that holds more than the allowed number of tensors can."""
    if len(raw) <= SMALL:
        return
    lists, objects, commas = count_values(raw)
    if objects > MAX_TENSORS + 2:
        raise SourceError(
            f"{file}: the header names {objects:,} tensors; a file may have up to {MAX_TENSORS:,}"
        )
    if lists > 2 * objects or commas > 10 * objects + MAX_LABELS:
        raise SourceError(
            f"{file}: the header holds {lists:,} lists and {commas:,} commas in {objects:,} "
            "objects, which is not a table of tensors"
        )


def _compact(pairs: Pairs) -> dict[str, Any] | _Entry:
    """A tensor's fields, in as little memory as possible.

    ValueError for a key that appears twice, or that is not text (half of a surrogate pair).
    """
    found = dict(pairs)
    for name in found:
        name.encode("utf-8")
    if len(found) != len(pairs):
        raise ValueError(f"the key {_first_twice(pairs)[:MAX_NAME]!r} appears twice")
    if not found.keys() >= FIELDS or all(isinstance(v, str) for v in found.values()):
        return found  # metadata, or what `_stored` refuses
    dtype, shape = found["dtype"], found["shape"]
    if isinstance(dtype, str) and dtype in DTYPES:
        dtype = KNOWN[dtype]
    shape = tuple(shape) if isinstance(shape, list) else shape
    return _Entry(dtype, shape, found["data_offsets"])


FIELDS = {"dtype", "shape", "data_offsets"}

KNOWN = {name: name for name in DTYPES}
"""One string for all tensors of a dtype."""


def _first_twice(pairs: Pairs) -> str:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no key appears twice")


def _metadata(file: Path, value: object) -> dict[str, str]:
    if value is None:  # as safetensors itself reads it
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise SourceError(f"{file}: __metadata__ must map strings to strings")
    return value


def _stored(
    found: Opened | RemoteFile, name: str, value: object, start: int, size: int
) -> StoredTensor:
    file = found.file
    _check_name(file, name)
    where = f"{file}: tensor {name!r}"
    if not isinstance(value, _Entry):
        raise SourceError(
            f"{where}: expected dtype, shape and data_offsets, found {str(value)[:80]}"
        )
    dtype, shape, offsets = value
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SourceError(f"{where}: unknown dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, tuple) or not _counts(shape):
        raise SourceError(f"{where}: shape {_listed(shape)} is not a list of sizes")
    if len(shape) > MAX_AXES:
        raise SourceError(f"{where}: {len(shape):,} axes; a tensor has up to {MAX_AXES}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _counts(offsets):
        raise SourceError(f"{where}: data_offsets {_listed(offsets)} is not a range")
    if offsets[0] > offsets[1]:
        raise SourceError(f"{where}: data_offsets {_listed(offsets)} is not a range")
    spec = TensorSpec(dtype, shape)
    if offsets[1] - offsets[0] != spec.nbytes:
        raise SourceError(
            f"{where}: {str(spec)[:80]} needs {_number(spec.nbytes)} bytes, its data_offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    if start + offsets[1] > size:
        raise SourceError(
            f"{where}: truncated: its data ends at byte {start + offsets[1]}, the file at {size}"
        )
    return StoredTensor(name, spec, file, start + offsets[0], found.identity)


def _check_name(file: Path, name: str) -> None:
    """Names go to terminals, logs and pages, so they must not move the cursor or forge a line."""
    if len(name) > MAX_NAME:
        raise SourceError(
            f"{file}: a tensor's name has {len(name):,} characters ({name[:40]!r}...); it may have "
            f"up to {MAX_NAME:,}"
        )
    if not name.isprintable():
        raise SourceError(f"{file}: tensor {name[:200]!r}: the name has unprintable characters")


def _listed(value: object) -> str:
    return str(list(value[:20]) if isinstance(value, tuple | list) else value)[:80]


def _number(value: int) -> str:
    """For messages: a product of sizes may have hundreds of digits."""
    return str(value) if value < 1 << 64 else "more than 2**64"


def _counts(values: tuple[Any, ...] | list[Any]) -> bool:
    """True for non-negative integers that fit 64 bits (a bool is not an integer here)."""
    return all(type(x) is int and 0 <= x < 1 << 63 for x in values)


def _check_ranges(file: Path, stored: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """The tensors must cover the data exactly, as the format requires."""
    at = start
    for tensor in sorted(stored.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            kind = (
                "overlaps the tensor before it" if tensor.offset < at else "leaves a gap before it"
            )
            raise SourceError(
                f"{file}: tensor {tensor.name!r} {kind}: starts at {tensor.offset}, expected {at}"
            )
        at += tensor.nbytes
    if at != size:
        raise SourceError(f"{file}: its tensors end at byte {at}, the file at {size}")
