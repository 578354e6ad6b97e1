"""The text to compare on: lines of token ids, some of them questions with an answer.

Shape letters: B batch, S positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from ckptq.errors import SourceError, UsageError
from ckptq.text.rows import read_rows
from ckptq.text.samples import Batch, Samples
from ckptq.text.tokens import Tokenizer

MAX_QUESTIONS = 100_000

TOKENS_AT_ONCE = 8192
"""In a forward pass on a GPU: with fewer it waits for the host between two operations."""
LINES_AT_ONCE = 256
"""However short: the logits of one position of each are in memory together."""


@dataclass(frozen=True, slots=True)
class Line:
    """Token ids, and what is measured on them."""

    token_ids: tuple[int, ...]
    scored: int | None = 1
    """The first token on which divergence and perplexity are measured; None for none."""
    answer: int | None = None
    """Where the answer begins, if the line is a question of a task."""


@dataclass(frozen=True, slots=True)
class Text:
    """The lines of one evaluation."""

    lines: tuple[Line, ...]
    source: str

    def __post_init__(self) -> None:
        if not self.tokens:
            raise SourceError(f"{self.source}: no line of at least two tokens to compare models on")

    @property
    def tokens(self) -> int:
        """Tokens that are predicted and compared."""
        scored = ((line.scored, len(line.token_ids)) for line in self.lines)
        return sum(length - first for first, length in scored if first is not None)

    def batches(self, size: int | None) -> Iterator[tuple[Batch, tuple[Line, ...]]]:
        """In order, `size` at a time, padded on the right; each with its lines.

        Without `size` neighbours of the same length go together, up to TOKENS_AT_ONCE, so that
        nothing is padded.
        """
        for chunk in self._alike() if size is None else self._chunks(self.lines, size):
            samples = Samples(tuple(line.token_ids for line in chunk), self.source, 0, 0)
            yield next(samples.batches(len(chunk))), chunk

    def _alike(self) -> Iterator[tuple[Line, ...]]:
        for length, lines in groupby(self.lines, key=lambda line: len(line.token_ids)):
            yield from self._chunks(lines, max(1, min(LINES_AT_ONCE, TOKENS_AT_ONCE // length)))

    def _chunks(self, lines: Iterable[Line], size: int) -> Iterator[tuple[Line, ...]]:
        if size < 1:
            raise UsageError(f"batch_size must be at least 1, got {size}")
        rest = iter(lines)
        while chunk := tuple(islice(rest, size)):
            yield chunk


def text_of(samples: Samples | None, questions: Sequence[Line], source: str = "") -> Text:
    """Text to compare on, and questions. Without text, their answers are used."""
    if samples is None:
        lines = (Line(q.token_ids, scored=q.answer, answer=q.answer) for q in questions)
        return Text(tuple(lines), source)
    plain = tuple(Line(ids) for ids in samples.token_ids)
    asked = tuple(Line(q.token_ids, scored=None, answer=q.answer) for q in questions)
    return Text((*plain, *asked), samples.source)


def read_questions(
    file: Path, checkpoint: Path, *, limit: int | None = None, seed: int = 0
) -> list[Line]:
    """A task file in .jsonl: one {"prompt": ..., "answer": ...} per line.

    Prompt and answer are joined by a space unless one of them has one there; the answer begins
    at the first token that is not the prompt's. `limit` draws that many with `seed`, in
    order. SourceError for a missing file, a line without a field, or an answer without a
    token of its own.
    """
    if not file.is_file():
        raise SourceError(f"{file}: no such file; --task expects a .jsonl with prompt and answer")
    rows = list(enumerate(read_rows(file, "test", MAX_QUESTIONS), start=1))
    if not rows:
        raise SourceError(f"{file}: no question in it")
    if limit is not None and limit < len(rows):
        chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
        rows = [rows[index] for index in chosen]
    tokenizer = Tokenizer(checkpoint, str(file))
    return [_question(file, number, row, tokenizer) for number, row in rows]


def _question(file: Path, number: int, row: object, tokenizer: Tokenizer) -> Line:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    answer = row.get("answer") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
        raise SourceError(f"{file}: question {number} needs a prompt and an answer, both text")
    blank = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    asked = tokenizer.row({"text": prompt.rstrip() or prompt}, number)
    whole = tokenizer.row({"text": prompt + blank + answer}, number)
    # a tokenizer may merge across the seam, or end each text with a token of its own
    start = next(
        (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked)
    )
    if start >= len(whole) or start == 0:
        raise SourceError(f"{file}: question {number}: the answer {answer!r} has no token")
    return Line(tuple(whole), answer=start)
