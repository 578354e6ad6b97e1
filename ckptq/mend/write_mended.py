"""A mended checkpoint through the one writer: unchanged shards are taken whole, others written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.header import Header
from ckptq.checkpoint.open import CONFIG, INDEX, SINGLE, Checkpoint
from ckptq.checkpoint.read import Files
from ckptq.checkpoint.side_files import render_json
from ckptq.checkpoint.write import index_bytes
from ckptq.convert.documents import run_record
from ckptq.convert.output import Job, RunOptions, write_output
from ckptq.convert.permute import shared_metadata
from ckptq.convert.preflight import check_disk, slab_rooms
from ckptq.errors import SourceError, UsageError
from ckptq.files import write_whole
from ckptq.mend.draft import Draft, untouched
from ckptq.mend.repair import Again, Made, Repair
from ckptq.mend.tensors.from_source import restricted
from ckptq.permute.marks import METADATA_KEY, parse
from ckptq.plan.unit import Unit
from ckptq.progress import Begin, Note
from ckptq.spec import TensorSpec, spec_of

if TYPE_CHECKING:
    from torch import Tensor

KEPT = ".before-mend"
"""Suffix of the copy that is kept of a file that is replaced in place."""


class Computed(Mapping[str, "Tensor"]):
    """Tensors by name, each computed when it is asked for, so that one is in memory at a time."""

    def __init__(self, made: Mapping[str, Made]) -> None:
        self._made = made

    def __getitem__(self, name: str) -> Tensor:
        with Files() as files:
            tensor = self._made[name].tensor(files)
        assert spec_of(tensor) == self._made[name].spec, name
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def write_mended(
    draft: Draft,
    repairs: tuple[Repair, ...],
    out: Path,
    *,
    source: Checkpoint | None,
    options: RunOptions,
    begin: Begin,
    note: Note,
) -> None:
    """Write the draft to `out`, which appears whole at the end, or not at all (`write_output`)."""
    whole = untouched(draft)
    shards = _shards(draft, whole)
    units = [unit for units in shards.values() for unit in units]
    written = sum(unit.write_bytes for unit in units)
    check_disk(written, out, draft.original.side_bytes())
    made = {name: m for name, m in draft.computed.items() if isinstance(m, Made)}
    job = Job(
        name="mend",
        shards=shards,
        marks=_marks(draft.ckpt),
        metadata=_metadata(draft.ckpt),
        whole=whole,
        documents=_documents(draft),
        scales=Computed(made),
        workers=options.threads,
        device=options.device,
        rooms=slab_rooms(units, options.max_ram, options.threads) if units else (0, 0),
    )
    record = _record(draft, repairs, source)
    write_output(
        draft.original,
        out,
        record,
        lambda _: job,
        linked=[header.file for header in whole.values()],
        restart=options.restart,
        begin=begin,
        note=note,
    )


def _record(draft: Draft, repairs: tuple[Repair, ...], source: Checkpoint | None) -> dict[str, Any]:
    """What the output depends on: the checkpoint, the source, and every repair."""
    said = [[one.code, one.where, one.said] for one in repairs]
    made = run_record(draft.original, {"command": "mend", "repairs": said})
    if source is not None:
        made["made_from"] = run_record(source, {})["source"]
    return made


def _shards(draft: Draft, whole: Mapping[str, Header]) -> dict[str, tuple[Unit, ...]]:
    """The shards that are written. A single one gets the name that every loader looks for."""
    taken: set[str] = set()
    shards = {
        header.file.name: tuple(_units(draft, header, taken))
        for header in draft.ckpt.headers
        if header.file.name not in whole
    }
    shards = {name: units for name, units in shards.items() if units}
    if len(shards) == 1 and not whole:
        return {SINGLE: next(iter(shards.values()))}
    return shards


def _units(draft: Draft, header: Header, taken: set[str]) -> Iterator[Unit]:
    """A unit for each tensor; what is converted together is one, where its first tensor is."""
    for name, tensor in header.tensors.items():
        change = draft.computed.get(name)
        if isinstance(change, Again):
            if change.unit.key not in taken:
                taken.add(change.unit.key)
                yield restricted(change.unit, _wanted(draft, change.unit))
        elif isinstance(change, Made):
            yield Unit(key=name, rule="mended", scales={name: change.spec})
        else:
            yield Unit(key=name, rule="copied", copies={name: tensor})


def _wanted(draft: Draft, unit: Unit) -> frozenset[str]:
    return frozenset(
        name
        for name, change in draft.computed.items()
        if isinstance(change, Again) and change.unit.key == unit.key
    )


def _marks(ckpt: Checkpoint) -> dict[Any, Any]:
    marked = {header.metadata.get(METADATA_KEY, "") for header in ckpt.headers}
    if len(marked) != 1:
        raise SourceError(f"{ckpt.path}: the shards are marked with different RoPE orders")
    return dict(parse(marked.pop(), str(ckpt.path)))


def _metadata(ckpt: Checkpoint) -> dict[str, str]:
    return {k: v for k, v in shared_metadata(ckpt).items() if k != METADATA_KEY}


def _documents(draft: Draft) -> dict[str, bytes]:
    """What is new beside the shards; config.json only where it changes."""
    made = {name: file.read_bytes() for name, file in draft.files.items()}
    config = draft.original.path / CONFIG
    same = draft.ckpt.config == draft.original.config
    made[CONFIG] = config.read_bytes() if same else render_json(config, draft.ckpt.config)
    return made


def write_in_place(draft: Draft) -> tuple[Path, ...]:
    """Replace config.json and the index where they change; returns the copies that are kept.

    UsageError for an earlier copy that is still there, unless it is of the file as it is now: then
    a run was killed between the two.
    """
    made = {CONFIG: _documents(draft)[CONFIG]} if draft.ckpt.config != draft.original.config else {}
    if draft.index:
        shards = {header.file.name: _specs(header) for header in draft.ckpt.headers}
        made[INDEX] = index_bytes(shards)
    files = {draft.original.path / name: data for name, data in made.items()}
    there = [file for file in files if file.exists()]
    for file in [file for file in there if not _is_kept(file)]:
        write_whole(_kept(file), file.read_bytes(), replace=False)
    for file, data in files.items():
        write_whole(file, data)
    return tuple(map(_kept, there))


def _kept(file: Path) -> Path:
    return file.with_name(file.name + KEPT)


def _is_kept(file: Path) -> bool:
    """Whether there is a copy of the file; UsageError for one of another file."""
    copy = _kept(file)
    if not os.path.lexists(copy):
        return False
    if copy.is_symlink() or not copy.is_file() or copy.read_bytes() != file.read_bytes():
        raise UsageError(f"{copy}: an earlier repair kept this copy; move it away")
    return True


def _specs(header: Header) -> dict[str, TensorSpec]:
    return {name: tensor.spec for name, tensor in header.tensors.items()}
