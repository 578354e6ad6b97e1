"""A checkpoint of which one file cannot be read: without that file it can be mended."""

from __future__ import annotations

from pathlib import Path

from ckptq.checkpoint.header import read_header
from ckptq.checkpoint.open import INDEX, Checkpoint, Problems, open_checkpoint, read_index
from ckptq.errors import SourceError


def open_broken(path: str | Path, source: str | Path | None, problems: Problems) -> Checkpoint:
    """The checkpoint; SourceError says what to do where a shard or the index is no such file."""
    try:
        return open_checkpoint(path, problems=problems)
    except SourceError as error:
        folder = Path(path)
        for file in (folder / INDEX, *sorted(folder.glob("*.safetensors"))):
            if file.is_file() and _is_unreadable(file):
                raise SourceError(f"{error}; {_advice(file, source)}") from error
        raise


def _is_unreadable(file: Path) -> bool:
    try:
        if file.name == INDEX:
            read_index(file)
        else:
            read_header(file)
    except SourceError:
        return True
    return False


def _advice(file: Path, source: str | Path | None) -> str:
    if file.name == INDEX:
        return f"delete {file.name}: mend writes it again, by the shards"
    given = "" if source is not None else " with --source"
    return f"delete {file.name}: mend{given} makes what it held again from the source"
