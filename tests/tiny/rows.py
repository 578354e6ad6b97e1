"""Rows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch


def token_rows(
    lengths: Iterable[int], seed: int = 7, ids: tuple[int, int] = (3, 110)
) -> list[list[int]]:
    """Random token ids from `ids[0]` on and below `ids[1]`, without those that are special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(*ids, (n,), generator=generator).tolist() for n in lengths]


def write_rows(file: Path, rows: Sequence[Sequence[int]]) -> Path:
    """A file that `--data` takes."""
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file
