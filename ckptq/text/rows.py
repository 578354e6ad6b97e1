"""Where text comes from: files, data sets, and a corpus that comes with Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ckptq.errors import SourceError, UsageError
from ckptq.text.tokens import Row

FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip")
"""Suffixes that data sets' names do not have."""


UTF8 = "utf-8-sig"
"""UTF-8, with or without the byte order mark that Windows' editors put in front."""

MOST_LETTERS = 1 << 27
"""Of a row of a .jsonl file. A book has a million characters."""


def builtin_corpus() -> str:
    """English about Python, 0.7 MB. A stopgap: text like the expected traffic is better."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path, limit: int) -> str:
    """The first `limit` characters of a UTF-8 file."""
    try:
        with path.open(encoding=UTF8) as file:
            return file.read(limit)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as text: {error}") from error


def read_rows(path: Path, split: str, limit: int) -> Iterator[Row]:
    """At most `limit` rows of a .jsonl or .parquet file, or of a data set given by id or folder."""
    if path.suffix == ".jsonl":
        return islice(_jsonl(path), limit)
    if path.suffix == ".parquet":
        return islice(_parquet(path), limit)
    if path.is_file():
        raise SourceError(f"{path}: unknown kind of text; known: .txt, .jsonl, .parquet")
    if not path.exists() and not _may_be_an_id(path):
        raise SourceError(f"{path}: no such file or folder")
    return islice(_dataset(str(path), split), limit)


def _may_be_an_id(path: Path) -> bool:
    """A data set on the hub is NAME or OWNER/NAME; looking up a path there takes half a minute."""
    return len(path.parts) <= 2 and path.suffix not in FILES and path.parts[0] not in ("..", "/")


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding=UTF8) as file:
            lines = iter(lambda: file.readline(MOST_LETTERS), "")
            for number, line in enumerate(lines, start=1):
                if len(line) == MOST_LETTERS:
                    raise SourceError(
                        f"{path}, line {number}: longer than {MOST_LETTERS:,} characters"
                    )
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise SourceError(f"{path}, line {number}: not a JSON object")
                    yield row
    except (json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{path}, line {number}: not valid JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as text: {error}") from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read as parquet: {error}") from error


def _dataset(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{name}: not a .txt, .jsonl or .parquet file; a data set needs datasets: "
            "pip install datasets"
        ) from error
    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()
        raise SourceError(
            f"{name}: no such file or data set (split {split!r}): "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
