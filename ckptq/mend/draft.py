"""The checkpoint as it will be: the one on disk with all repairs so far. No tensor is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptq.checkpoint.header import Header, StoredTensor, by_place
from ckptq.checkpoint.open import Checkpoint
from ckptq.mend.repair import Again, Change, Made, Repair
from ckptq.permute.marks import METADATA_KEY
from ckptq.verify.report import Finding

OF_INDEX = ("index-mismatch", "total-size")
OF_FILES = ("side-file-missing", "tokenizer-differs", "vocabulary")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A changed checkpoint in memory.

    `verify` can judge `ckpt` from headers. Its data can be read where nothing is computed:
    `computed` tensors stand in it with their specs, and no bytes.
    """

    original: Checkpoint
    ckpt: Checkpoint
    computed: Mapping[str, Made | Again] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    index: bool = False

    def repaired(self, repair: Repair) -> Draft:
        """With one more repair."""
        ckpt = self.ckpt if repair.config is None else replace(self.ckpt, config=repair.config)
        ckpt = _unmarked(ckpt) if repair.unmarked else ckpt
        computed = {n: m for n, m in self.computed.items() if n not in repair.changes}
        computed |= {n: c for n, c in repair.changes.items() if isinstance(c, Made | Again)}
        return replace(
            self,
            ckpt=_changed(ckpt, repair.changes) if repair.changes else ckpt,
            computed=computed,
            files={**self.files, **repair.files},
            index=self.index or repair.index,
        )

    def settles(self, finding: Finding) -> bool:
        """Whether a repair of a file, which headers do not show, has settled it."""
        if finding.code in OF_INDEX:
            return self.index or self._adds(finding.tensor)
        return finding.code in OF_FILES and finding.file in self.files

    def _adds(self, name: str | None) -> bool:
        """Whether the tensor was missing. The index of what is written has it."""
        return name in self.ckpt.tensors and name not in self.original.tensors


def draft_of(ckpt: Checkpoint) -> Draft:
    """Nothing repaired yet."""
    return Draft(original=ckpt, ckpt=replace(ckpt, headers=tuple(map(_in_place, ckpt.headers))))


def _in_place(header: Header) -> Header:
    return replace(header, tensors={tensor.name: tensor for tensor in by_place(header)})


def _unmarked(ckpt: Checkpoint) -> Checkpoint:
    """Without the marks of a RoPE order in config and shards."""
    ours = {k: v for k, v in (ckpt.config.get("ckptq") or {}).items() if k != "rope_order"}
    config: dict[str, Any] = {k: v for k, v in ckpt.config.items() if k != "ckptq"}
    headers = (
        replace(h, metadata={k: v for k, v in h.metadata.items() if k != METADATA_KEY})
        for h in ckpt.headers
    )
    return replace(ckpt, config=config | ({"ckptq": ours} if ours else {}), headers=tuple(headers))


def _changed(ckpt: Checkpoint, changes: Mapping[str, Change]) -> Checkpoint:
    """What was there stays in its shard and place; what is new follows its siblings."""
    places = dict(_new_places(ckpt, changes))
    headers = []
    for header in ckpt.headers:
        tensors = dict(_kept(header, changes))
        for name, shard in places.items():
            if shard == header.file.name:
                tensors = _inserted(tensors, name, _stored(name, changes[name], header.file))
        headers.append(replace(header, tensors=tensors))
    whole = {n: t for header in headers for n, t in header.tensors.items()}
    return replace(ckpt, headers=tuple(headers), tensors=whole)


def _kept(header: Header, changes: Mapping[str, Change]) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in header.tensors.items():
        if name not in changes:
            yield name, tensor
        elif (change := changes[name]) is not None:
            yield name, _stored(name, change, header.file)


def _stored(name: str, change: Change, shard: Path) -> StoredTensor:
    """What stands under this name; without bytes where they are computed."""
    assert change is not None
    if isinstance(change, StoredTensor):
        return replace(change, name=name)
    return StoredTensor(name, change.spec, shard, 0)


def _new_places(ckpt: Checkpoint, changes: Mapping[str, Change]) -> Iterator[tuple[str, str]]:
    """(new name, shard): where its bytes are, else where its siblings are, else the last."""
    shards = {name: header.file.name for header in ckpt.headers for name in header.tensors}
    files = {header.file for header in ckpt.headers}
    for name, change in changes.items():
        if name in shards or change is None:
            continue
        if isinstance(change, StoredTensor) and change.file in files:
            yield name, change.file.name
        else:
            yield name, _near(name, shards) or ckpt.headers[-1].file.name


def _near(name: str, shards: Mapping[str, str]) -> str | None:
    """The shard of what stands nearest by name: the same module, its parent, and so on."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        found = [shard for other, shard in shards.items() if other.startswith(f"{parent}.")]
        if parent and found:
            return found[-1]
    return None


def _inserted(
    tensors: dict[str, StoredTensor], name: str, stored: StoredTensor
) -> dict[str, StoredTensor]:
    """Behind the last tensor of its module, else at the end."""
    module = name.rpartition(".")[0]
    siblings = [other for other in tensors if other.rpartition(".")[0] == module]
    if not siblings:
        return {**tensors, name: stored}
    made: dict[str, StoredTensor] = {}
    for other, tensor in tensors.items():
        made[other] = tensor
        if other == siblings[-1]:
            made[name] = stored
    return made


def untouched(draft: Draft) -> dict[str, Header]:
    """Shards of the original that the draft leaves as they are."""
    before = {header.file: _in_place(header) for header in draft.original.headers}
    same = {}
    for header in draft.ckpt.headers:
        old = before[header.file]
        alike = old.metadata == header.metadata and list(old.tensors) == list(header.tensors)
        if alike and all(_same(t, old.tensors[n]) for n, t in header.tensors.items()):
            same[header.file.name] = header
    return same


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    return (a.file, a.offset, a.spec) == (b.file, b.offset, b.spec)
