"""Calibrated scales as one small file: the output of calibration and an input of quantization.

A safetensors file with the scales under the names that they get in the checkpoint
("model.layers.0.self_attn.k_scale"), the statistics they were read from beside them ("...k_amin",
"...k_amax"), and a JSON record of how they were made under the metadata key "ckptq_scales".
Nothing in it depends on time, place or thread count, so equal runs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ckptq.checkpoint.header import read_header
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import read_tensors
from ckptq.errors import PlanError, SourceError, UsageError
from ckptq.files import write_whole

RECORD_KEY = "ckptq_scales"
VERSION = 1
SCALE_SUFFIXES = ("_scale",)
STATISTIC_SUFFIXES = ("_amin", "_amax")


@dataclass(frozen=True, kw_only=True)
class Record:
    """How scales were made."""

    version: int = VERSION
    model: str
    source_fingerprint: str
    strategy: str | None
    """How q, k and v share scales; None where attention was left out."""
    observer: str
    observer_arguments: dict[str, Any] = field(default_factory=dict)
    input_observer: str
    text: str
    samples: int
    tokens: int
    seq_len: int
    batch_size: int
    seed: int
    token_digest: str
    attention: dict[str, str]
    """Attention module, as named on disk -> its class in transformers ("LlamaAttention")."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Scales by their name on disk, and what they were read from."""

    tensors: Mapping[str, Tensor]
    """"...self_attn.{q,k,v}_scale": [1] or [heads, 1, 1]; "<linear>.input_scale" or
    "<linear>.input_global_scale": [1]."""
    statistics: Mapping[str, Tensor]
    """The same names with _amin and _amax: the lowest and highest value seen. A kernel gives the
    largest magnitude alone; then they are that, with either sign."""
    made: Record

    @property
    def attention_class(self) -> str | None:
        """The one class of all attention modules: the target of an attention config group.

        None where attention was left out.
        """
        classes = sorted(set(self.made.attention.values()))
        if len(classes) > 1:
            raise PlanError(
                f"attention modules of {self.made.model} have {len(classes)} classes "
                f"({', '.join(classes)}); vLLM supports only one target in an attention group"
            )
        return classes[0] if classes else None

    def record(self) -> dict[str, Any]:
        """How they were made, as JSON data."""
        return asdict(self.made)


def save_scales(path: Path, scales: Scales, beside: Path | None = None) -> None:
    """Write the file atomically, replacing only another scales file; `beside` is the folder for its
    temporary file.

    UsageError if anything else has that name.
    """
    from safetensors.torch import save

    record = json.dumps(scales.record(), sort_keys=True)
    tensors = {**scales.statistics, **scales.tensors}
    # one key only: safetensors writes several in an order that changes from call to call
    metadata = {RECORD_KEY: record}
    # not save_file, which from safetensors 0.8 on makes files that only their owner may read
    data = save({n: tensors[n].contiguous() for n in sorted(tensors)}, metadata)
    there = path.exists()
    check_replaceable(path)
    write_whole(path, data, beside, replace=there)


def check_replaceable(path: Path) -> None:
    """UsageError if the file exists and is not a scales file."""
    if not path.is_file():
        return
    try:
        found = RECORD_KEY in read_header(path).metadata
    except SourceError:
        found = False
    if not found:
        raise UsageError(
            f"{path}: exists and is not a scales file; remove it or choose another output"
        )


def load_scales(path: Path) -> Scales:
    """Read the file back. Raises SourceError when `ckptq calibrate` did not make it."""
    if not path.is_file():
        raise SourceError(f"{path}: no such scales file")
    header = read_header(path)
    record = _record(path, header.metadata.get(RECORD_KEY))
    tensors = read_tensors(header.tensors)
    return Scales(
        tensors={name: t for name, t in tensors.items() if name.endswith(SCALE_SUFFIXES)},
        statistics={name: t for name, t in tensors.items() if name.endswith(STATISTIC_SUFFIXES)},
        made=record,
    )


def source_fingerprint(ckpt: Checkpoint) -> str:
    """sha256 over config.json and the headers of all shards: names, shapes, places; no data."""
    digest = hashlib.sha256(json.dumps(dict(ckpt.config), sort_keys=True).encode())
    for header in sorted(ckpt.headers, key=lambda header: header.file.name):
        digest.update(f"{header.file.name} {header.nbytes} {header.digest}\n".encode())
    return digest.hexdigest()


def _record(path: Path, text: str | None) -> Record:
    if text is None:
        raise SourceError(f"{path}: not a scales file: no {RECORD_KEY!r} in its metadata")
    try:
        value = json.loads(text)
        if value.get("version") != VERSION:
            raise SourceError(
                f"{path}: scales file version {value.get('version')}; expected {VERSION}"
            )
        return _typed(Record(**value))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{path}: damaged provenance record: {error}") from error


def _typed(record: Record) -> Record:
    """TypeError names a field with another type than `calibrate` writes."""
    kinds = {"str": str, "int": int, "dict[str, Any]": dict, "dict[str, str]": dict}
    for each in fields(record):
        value = getattr(record, each.name)
        kind = kinds[str(each.type).removesuffix(" | None")]
        if not isinstance(value, kind) and not (value is None and "None" in str(each.type)):
            raise TypeError(f"{each.name} is {value!r:.80}")
    if not all(isinstance(name, str) for name in record.attention.values()):
        raise TypeError(f"attention is {record.attention!r:.80}")
    return record
