"""Parse a safetensors header, trusting nothing in it: bounds first, then bytes.

A file is: u64 little-endian length of a JSON object, the object, then the tensors' bytes without
gaps (huggingface/safetensors README). Errors name the file and the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptq.errors import SourceError
from ckptq.spec import DTYPES, TensorSpec

MAX_HEADER = 100_000_000
"""The safetensors library's own limit, in bytes."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies on disk. `offset` counts from the start of the file."""

    name: str
    spec: TensorSpec
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True, slots=True)
class Header:
    """What one safetensors file says of itself."""

    file: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    nbytes: int
    digest: str
    """sha256 of the header's bytes: changes when any name, shape, dtype or place changes."""


def read_header(file: Path) -> Header:
    """Read and check the header of `file`; reads no tensor data.

    Raises SourceError for a truncated file, a header that is no JSON object, unknown dtypes, shapes
    that do not fit their byte range, and ranges that overlap, leave gaps or leave the file.
    """
    import hashlib

    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = _header_length(file, handle.read(8), size)
            raw = handle.read(length)
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(raw) != length:
        raise SourceError(f"{file}: truncated: the header has {len(raw)} of {length} bytes")
    entries = _parse(file, raw)
    metadata = _metadata(file, entries.pop("__metadata__", {}))
    start = 8 + length
    stored = {name: _entry(file, name, value, start, size) for name, value in entries.items()}
    _check_ranges(file, stored, start, size)
    return Header(file, stored, metadata, size, hashlib.sha256(raw).hexdigest())


def _header_length(file: Path, first: bytes, size: int) -> int:
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
    return length


def _parse(file: Path, raw: bytes) -> dict[str, object]:
    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=_strict_object)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: the header is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(parsed, dict):
        raise SourceError(f"{file}: the header is a JSON {type(parsed).__name__}, wanted an object")
    return parsed


def _strict_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """ValueError for a key that is there twice, or that is no text (half of a surrogate pair)."""
    found = dict(pairs)
    for name in found:
        name.encode("utf-8")
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return found


def _metadata(file: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise SourceError(f"{file}: __metadata__ must map strings to strings")
    return value


def _entry(file: Path, name: str, value: object, start: int, size: int) -> StoredTensor:
    where = f"{file}: tensor {name!r}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise SourceError(f"{where}: wanted dtype, shape and data_offsets, found {str(value)[:80]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SourceError(f"{where}: unknown dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPES)}")
    if not _counts(shape):
        raise SourceError(f"{where}: shape {str(shape)[:80]} is not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceError(f"{where}: data_offsets {str(offsets)[:80]} is not a range")
    spec = TensorSpec(dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise SourceError(
            f"{where}: {str(spec)[:80]} needs {_number(spec.nbytes)} bytes, its data_offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    if start + offsets[1] > size:
        raise SourceError(
            f"{where}: truncated: its data ends at byte {start + offsets[1]}, the file at {size}"
        )
    return StoredTensor(name, spec, file, start + offsets[0])


def _number(value: int) -> str:
    """A product of sizes may have hundreds of digits."""
    return str(value) if value < 1 << 64 else "more than 2**64"


def _counts(value: object) -> bool:
    """True for a list of non-negative integers that fit 64 bits (bool is no integer here)."""
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 63 for x in value)


def _check_ranges(file: Path, stored: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """The tensors must tile the data exactly, as the format demands."""
    at = start
    for tensor in sorted(stored.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != at:
            kind = (
                "overlaps the tensor before it" if tensor.offset < at else "leaves a gap before it"
            )
            raise SourceError(
                f"{file}: tensor {tensor.name!r} {kind}: starts at {tensor.offset}, wanted {at}"
            )
        at += tensor.nbytes
    if at != size:
        raise SourceError(f"{file}: its tensors end at byte {at}, the file at {size}")
