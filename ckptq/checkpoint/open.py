"""Open a checkpoint, a folder or a hub id: names, shapes and places. Headers only, no data.

Only safetensors is read, never pickle; file names that an index gives must stay inside the folder.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptq.checkpoint.beside import (
    BROKEN,
    MODELOPT,
    PICKLES,
    Beside,
    refuse_adapter,
    refuse_adapter_tensors,
    shards_among,
    sort_files,
)
from ckptq.checkpoint.bounded import INDEX_BYTES, INDEX_VALUES, json_object
from ckptq.checkpoint.header import Header, StoredTensor, by_place, header_of, read_header
from ckptq.checkpoint.hub.chunks import Chunks
from ckptq.checkpoint.hub.snapshot import Snapshot, begin_stream, download
from ckptq.checkpoint.identity import Identity, State
from ckptq.checkpoint.partial import bears_mark, partial_of
from ckptq.errors import SourceError, UsageError
from ckptq.files import reading_errors

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


MAX_TENSORS = 1 << 21
"""In all files of a checkpoint; the largest known one has 210,000."""

Problems = list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint as its headers describe it."""

    path: Path
    name: str
    """The hub id, or the folder's name: what `base_model` in a model card says."""
    revision: str | None = None
    config: Mapping[str, Any]
    headers: tuple[Header, ...]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    """In the order of the files and of the bytes within each."""
    identities: Mapping[Path, State] = field(default_factory=dict, repr=False)
    """Of config.json, the index and the shards, when they were read."""
    streamed: Chunks | None = field(default=None, repr=False)
    """What has come of its shards, where they stay on the hub."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config: `text_config` where there is one."""
        text = self.config.get("text_config")
        return text if isinstance(text, dict) else self.config

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """Where vLLM and transformers look for it, in their order."""
        found = self.config.get("quantization_config") or self.text_config.get(
            "quantization_config"
        )
        found = found or self.config.get("compression_config")
        return found if isinstance(found, dict) else None

    def beside(self) -> Beside:
        """The files of the folder that are not its shards, sorted into its own and others."""
        own = {CONFIG, INDEX, *(header.file.name for header in self.headers)}
        return sort_files(self.path, own, self.tensors.keys())

    def side_files(self) -> list[Path]:
        """Everything that belongs to the checkpoint beside its tensors: tokenizer, processor,
        adapters, a Dense layer. Paths relative to the folder, sorted."""
        return list(self.beside().carried)

    def side_bytes(self) -> int:
        """Bytes of the side files."""
        return sum((self.path / side).stat().st_size for side in self.side_files())

    def pinned(self) -> dict[Path, State]:
        """Every file of the checkpoint as it was when it was opened, side files as they are now,
        for `check_unchanged` at the end of a run. SourceError for a link to a file that is gone, as
        in a hub's cache with a missing blob: it may have been the tokenizer."""
        sides: dict[Path, State] = {}
        beside = self.beside()
        for gone in (path for path, why in beside.left.items() if why == BROKEN):
            raise SourceError(f"{self.path / gone}: {_broken(self.path / gone)}")
        for side in beside.carried:
            with reading_errors(self.path / side):
                sides[self.path / side] = Identity.of((self.path / side).stat())
        return {**self.identities, **sides}


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    problems: Problems | None = None,
    *,
    stream: bool = False,
) -> Checkpoint:
    """Open a folder, or a hub id that huggingface_hub finds in its cache or downloads; with
    `stream`, its shards stay on the hub and are read by ranges, all at the commit found here.

    With a `problems` list, disagreements between index and files are appended to it instead of
    raised, so that `verify` can report them all, a missing index and missing files too; an
    unreadable checkpoint is still an error.
    """
    path, name, hub = _locate(source, revision, stream)
    names = hub.names if hub is not None else _names(path)
    refuse_adapter(path, names)
    config, identity = _config(path)
    identities: dict[Path, State] = {path / CONFIG: identity}
    config |= _quantization_beside(path, config, identities)
    index = _index(path, identities)
    headers = _headers(path, _shards(path, names, index, lenient=problems is not None), hub)
    identities |= {header.file: header.identity for header in headers}
    tensors: dict[str, StoredTensor] = {}
    found: Problems = []
    for header in headers:
        for tensor in by_place(header):
            if tensor.name in tensors:
                twin = tensors[tensor.name].file.name
                found.append(f"{header.file}: tensor {tensor.name!r} is also in {twin}")
            tensors.setdefault(tensor.name, tensor)
    twins = len(found)
    if index is not None:
        found += _disagreements(path, index, headers)
    refuse_adapter_tensors(path, tensors)
    if not tensors:
        raise SourceError(f"{path}: no tensor in {len(headers)} safetensors file(s)")
    if problems is not None:
        problems += found
    elif found:
        ways_out = () if twins else (f"`ckptq mend {path} OUT` writes an index of what is there",)
        raise SourceError("\n".join((*found[:20], *ways_out)))
    return Checkpoint(
        path=path,
        name=name,
        revision=revision if hub is None else hub.commit,
        config=config,
        headers=headers,
        tensors=tensors,
        identities=identities,
        streamed=None if hub is None else hub.chunks,
    )


def _names(folder: Path) -> frozenset[str]:
    """Of the files at its top."""
    return frozenset(path.name for path in folder.iterdir() if path.is_file())


def _headers(path: Path, files: list[Path], hub: Snapshot | None) -> tuple[Header, ...]:
    headers: list[Header] = []
    count = 0
    if hub is not None:
        hub.fetch_others(files)
    for file in files:
        headers.append(read_header(file) if hub is None else header_of(hub.remote(file.name)))
        count += len(headers[-1].tensors)
        if count > MAX_TENSORS:
            raise SourceError(f"{path}: more than {MAX_TENSORS:,} tensors in its files")
    return tuple(headers)


def _locate(
    source: str | Path, revision: str | None, stream: bool
) -> tuple[Path, str, Snapshot | None]:
    path = Path(source)
    if path.is_dir():
        if stream:
            raise UsageError(f"--stream applies only to hub ids; {source} is a local folder")
        if revision is not None:
            raise UsageError(
                f"--revision {revision} applies only to hub ids; {source} is a local folder"
            )
        return path, _folder_name(path.resolve()), None
    if path.exists():
        raise SourceError(f"{source}: is a file; expected a checkpoint folder or a hub id")
    _refuse_unfinished(path)
    text = str(source)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or "\\" in text:
        raise SourceError(f"{source}: no such folder")
    if stream:
        hub = begin_stream(text, revision)
        return hub.path, text, hub
    return download(text, revision), text, None


def _refuse_unfinished(path: Path) -> None:
    """Mention an unfinished run that was to write this folder."""
    if path.name and bears_mark(unfinished := partial_of(path)):
        raise SourceError(
            f"{path}: no such folder; {unfinished} holds an unfinished run: rerun the same command "
            "to resume, or with --restart if it was refused"
        )


def _folder_name(path: Path) -> str:
    """The folder's name; in the hub's cache (models--ORG--NAME/snapshots/COMMIT) the hub id."""
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return path.name


def _config(path: Path) -> tuple[dict[str, Any], Identity]:
    if not os.path.lexists(path / CONFIG):
        raise SourceError(f"{path}: no {CONFIG}; expected a Hugging Face checkpoint")
    return json_object(path / CONFIG)


def _quantization_beside(
    path: Path, config: Mapping[str, Any], identities: dict[Path, State]
) -> dict[str, Any]:
    """ModelOpt's own file, where vLLM looks if config.json has no quantization."""
    file = path / MODELOPT
    if "quantization_config" in config or not file.is_file():
        return {}
    found, identities[file] = json_object(file)
    return {"quantization_config": {"quant_method": "modelopt", **found}}


def _index(path: Path, identities: dict[Path, State]) -> dict[str, str] | None:
    """The index's weight_map, or None where there is no index."""
    file = path / INDEX
    if not file.exists():
        return None
    found, identities[file] = read_index(file)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(f"{file}: weight_map must map tensor names to file names")
    if not weight_map:
        raise SourceError(f"{file}: weight_map is empty")
    for name, target in weight_map.items():
        if not target.isprintable():
            raise SourceError(
                f"{file}: tensor {name!r} is mapped to {target!r}, which is not a file name"
            )
        if "/" in target or "\\" in target or target in ("", ".", "..") or "\0" in target:
            raise SourceError(
                f"{file}: tensor {name!r} is mapped to {target!r}, outside the folder {path}"
            )
    return weight_map


def read_index(file: Path) -> tuple[dict[str, Any], Identity]:
    """The contents of an index file."""
    return json_object(file, INDEX_BYTES, INDEX_VALUES)


def _shards(
    path: Path, names: Collection[str], index: Mapping[str, str] | None, *, lenient: bool
) -> list[Path]:
    if index is not None:
        return _listed(path, names, index, lenient)
    if SINGLE in names:
        return [path / SINGLE]
    found = shards_among(_safetensors(path, names))
    if len(found) == 1 or (found and lenient):
        return found
    if found:
        raise SourceError(f"{path}: {len(found)} safetensors files but no {INDEX} that lists them")
    pickled = sorted(name for name in names if name.endswith(PICKLES))
    if pickled:
        raise SourceError(
            f"{path}: only pickled weights ({pickled[0]}); ckptq reads only safetensors, because "
            "a pickle can run any code. Save it again with transformers' save_pretrained"
        )
    if (path / SINGLE).is_symlink():
        raise SourceError(f"{path / SINGLE}: {_broken(path / SINGLE)}")
    raise SourceError(f"{path}: no safetensors file")


def _broken(link: Path) -> str:
    return (
        f"is a link to {os.readlink(link)}, which does not exist; download it again, or remove it"
    )


def _safetensors(path: Path, names: Collection[str]) -> list[Path]:
    return sorted(path / name for name in names if name.endswith(".safetensors"))


def _listed(
    path: Path, names: Collection[str], index: Mapping[str, str], lenient: bool
) -> list[Path]:
    """The index's files; if one is missing, `lenient` takes what is there: it may be renamed."""
    files = {index[name]: name for name in reversed(list(index))}
    missing = [file for file in sorted(files) if file not in names]
    there = shards_among(_safetensors(path, names)) if missing and lenient else []
    if missing and not there:
        link = path / missing[0]
        gone = _broken(link) if link.is_symlink() else "does not exist"
        what = f"{missing[0]} (for tensor {files[missing[0]]!r}), which {gone}"
        raise SourceError(f"{path / INDEX}: names {what}")
    return there or [path / file for file in sorted(files)]


def _disagreements(path: Path, index: Mapping[str, str], headers: tuple[Header, ...]) -> Problems:
    """The differences between the index and the files' own headers."""
    held = {(header.file.name, name) for header in headers for name in header.tensors}
    promised = {(file, name) for name, file in index.items()}
    missing = [
        f"{path / file}: tensor {name!r} is in {INDEX}, not in the file"
        for file, name in sorted(promised - held)
    ]
    unlisted = [
        f"{path / file}: tensor {name!r} is in the file, not in {INDEX}"
        for file, name in sorted(held - promised)
    ]
    return missing + unlisted
