"""The files beside the shards of an output: new documents, and copies of the source's files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ckptq.checkpoint.bounded import opened
from ckptq.checkpoint.identity import Identity, State, check_same
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.write import Specs, write_index
from ckptq.errors import SourceError
from ckptq.files import clear_unfinished, json_bytes, write_whole


def render_json(source: Path, value: Mapping[str, Any]) -> bytes:
    """A JSON file for the output; SourceError if it cannot be written."""
    try:
        return json_bytes(value)
    except RecursionError as error:
        raise SourceError(f"{source}: nested too deeply to be written again") from error


def write_side_files(
    folder: Path,
    ckpt: Checkpoint,
    made: Mapping[str, bytes],
    shards: Mapping[str, Specs],
    pinned: Mapping[Path, State],
) -> list[str]:
    """Write everything but the shards: new documents, index, the source's other files; their names.

    `pinned` are the files of the source as they were when the run began.
    """
    clear_unfinished(folder)
    for name, data in made.items():
        write_whole(folder / name, data)
    others = _copy_others(folder, ckpt, pinned, made)
    beside = any(name.endswith(".safetensors") and "/" not in name for name in others)
    return [*made, *write_index(folder, shards, always=beside), *others]


def _copy_others(
    folder: Path, ckpt: Checkpoint, pinned: Mapping[Path, State], made: Collection[str]
) -> list[str]:
    """Copy the pinned files that are not config, index, shard or a new document; their names."""
    sides = (path for path in pinned if path not in ckpt.identities)
    names = {str(path.relative_to(ckpt.path)): path for path in sides}
    others = {name: path for name, path in names.items() if name not in made}
    for name, path in others.items():
        _copy(path, folder / name, pinned[path])
    return list(others)


def _copy(source: Path, target: Path, wanted: State) -> None:
    with opened(source) as found:
        assert isinstance(wanted, Identity), f"{source}: side files are on this disk"
        check_same(source, wanted, found.identity)
        write_whole(target, found.chunks())
