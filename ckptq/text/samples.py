"""Text becomes token ids, and token ids become padded batches.

What a row holds decides how it is read:

    text         prose. A row of .jsonl, .parquet or a data set is one sample, cut at `seq_len`.
                 A .txt file and the built-in corpus are one long text, cut into pieces of `seq_len`
                 tokens, each starting with the tokenizer's prefix (BOS).
    messages     a conversation, through the chat template (`conversations`: ShareGPT's spelling).
    input_ids    token ids, taken as they are.

Rows are drawn with `seed` and keep their order. Padding is on the right, after
everything that attention can see, and is masked.

Shape letters: B batch, S positions.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptq.errors import SourceError, UsageError
from ckptq.text.rows import builtin_corpus, read_rows, read_text
from ckptq.text.tokens import Row, Tokenizer

CHARACTERS_PER_TOKEN = 64
"""At most this many characters of a .txt file are read per requested token."""

ROWS_PER_SAMPLE = 64
"""At most this many rows of a data set are read per requested sample."""


OTHER_FIELDS = {"input_ids", "messages", "conversations"}
"""Fields that are used before a row's text."""


@dataclass(frozen=True)
class Batch:
    """Samples side by side; `lengths[b]` positions of row b are real, the rest is padding."""

    input_ids_BS: Tensor
    mask_BS: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """Token ids to calibrate on, and where they come from."""

    token_ids: tuple[tuple[int, ...], ...]
    source: str
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if not self.token_ids or not all(self.token_ids):
            raise SourceError(f"{self.source}: no calibration text in it")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """In order, `batch_size` at a time, padded to the longest of each batch."""
        rows = iter(self.token_ids)
        while chunk := list(islice(rows, batch_size)):
            lengths = tuple(len(row) for row in chunk)
            S = max(lengths)
            mask_BS = torch.arange(S)[None, :] < torch.tensor(lengths)[:, None]
            padded = [[*row, *[0] * (S - len(row))] for row in chunk]
            yield Batch(torch.tensor(padded), mask_BS.long(), lengths)

    @property
    def digest(self) -> str:
        """sha256 of the token ids, sample by sample."""
        return hashlib.sha256(json.dumps(self.token_ids).encode()).hexdigest()


def read_samples(
    source: str | Path | None,
    checkpoint: Path,
    *,
    samples: int = 512,
    seq_len: int = 2048,
    seed: int = 0,
    split: str = "train",
    trust_remote_code: bool = False,
) -> Samples:
    """Samples from a file, a data set, or (None) the corpus that comes with Python.

    Raises SourceError for a file that does not exist, cannot be parsed or holds no text,
    UsageError for numbers below 1.
    """
    if samples < 1 or seq_len < 1:
        raise UsageError(f"samples and seq_len must be at least 1, got {samples} and {seq_len}")
    label = "built-in corpus (Python's pydoc topics)" if source is None else str(source)
    draw = Draw(samples, seq_len, seed, label)
    tokenizer = Tokenizer(checkpoint, label, trust_remote_code)
    if source is None:
        return draw.from_text(builtin_corpus(), tokenizer)
    path = Path(source)
    if path.suffix == ".txt":
        return draw.from_text(read_text(path, samples * seq_len * CHARACTERS_PER_TOKEN), tokenizer)
    return draw.from_rows(read_rows(path, split, samples * ROWS_PER_SAMPLE), tokenizer)


@dataclass(frozen=True)
class Draw:
    """How many samples of which length to take, and the seed."""

    samples: int
    seq_len: int
    seed: int
    label: str

    def from_text(self, text: str, tokenizer: Tokenizer) -> Samples:
        """Cut one long text into pieces and take some of them."""
        if not text.strip():
            raise SourceError(f"{self.label}: no calibration text in it")
        prefix, ids = tokenizer.prefix(), tokenizer.plain(text)
        step = max(self.seq_len - len(prefix), 1)
        pieces = [[*prefix, *ids[at : at + step]] for at in range(0, len(ids), step)]
        if len(pieces) > 1:
            del pieces[-1]  # shorter than the rest
        return self._take(pieces)

    def from_rows(self, rows: Iterator[Row], tokenizer: Tokenizer) -> Samples:
        """Take some of the rows; each is one sample. Blank rows, as in wikitext, do not count."""
        chosen = self._choose([row for row in rows if not _is_blank(row)])
        ids = [tokenizer.row(row, number) for number, row in enumerate(chosen, start=1)]
        return self._samples([piece[: self.seq_len] for piece in ids if piece])

    def _take(self, pieces: Sequence[Sequence[int]]) -> Samples:
        return self._samples(self._choose(pieces))

    def _choose(self, items: Sequence[Any]) -> list[Any]:
        if len(items) <= self.samples:
            return list(items)
        chosen = random.Random(self.seed).sample(range(len(items)), self.samples)
        return [items[index] for index in sorted(chosen)]

    def _samples(self, pieces: Sequence[Sequence[int]]) -> Samples:
        return Samples(tuple(map(tuple, pieces)), self.label, self.seq_len, self.seed)


def _is_blank(row: Row) -> bool:
    text = row.get("text")
    return isinstance(text, str) and not text.strip() and not row.keys() & OTHER_FIELDS
