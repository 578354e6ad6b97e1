"""English prose from plain-text books, divided into calibration and held-out text that never meet.

Of every book the first part calibrates and the last is held out. Held-out paragraphs that share a
run of eight words with calibration (a refrain, a quotation, an appendix that repeats the body) are
dropped, and `write_rows` refuses texts that still share one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RUN = 8
"""Words in a row that only one of the two texts may hold."""
MIN_WORDS = 25
"""Of a paragraph: headings, tables, verses and addresses have fewer."""
SENTENCE_ENDS = (".", "!", "?", "'", '"', ")")
ROW_CHARACTERS = 2600
"""Of one sample: a little more than 512 tokens."""


@dataclass(frozen=True)
class Division:
    """Samples, each some paragraphs that follow one another in a book."""

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]


def paragraphs(book: str) -> list[str]:
    """The paragraphs of prose, each on one line, in order."""
    blocks = re.split(r"\n\s*\n", book.replace("\r\n", "\n"))
    joined = (" ".join(block.split()) for block in blocks)
    return [each for each in joined if _is_prose(each)]


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    whole = len(paragraph.split()) >= MIN_WORDS and paragraph.endswith(SENTENCE_ENDS)
    return whole and letters >= 0.9 * len(paragraph)


def divide(books: Iterable[str], held_out_share: float = 0.1) -> Division:
    """The first part of every book, and the last, without what the first parts hold too.

    ValueError where a book is too short to have both.
    """
    firsts: list[list[str]] = []
    lasts: list[list[str]] = []
    for number, book in enumerate(books, start=1):
        found = paragraphs(book)
        at = round(len(found) * (1 - held_out_share))
        if not 0 < at < len(found):
            raise ValueError(f"book {number} has {len(found)} paragraphs of prose, too few to part")
        firsts.append(found[:at])
        lasts.append(found[at:])
    seen = runs(paragraph for first in firsts for paragraph in first)
    kept = [[each for each in last if not runs([each]) & seen] for last in lasts]
    calibration = (row for first in firsts for row in _rows(first))
    held_out = (row for last in kept for row in _rows(last))
    return Division(tuple(calibration), tuple(held_out))


def runs(texts: Iterable[str], length: int = RUN) -> set[tuple[str, ...]]:
    """Every run of `length` words in a text, whatever their case and punctuation."""
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = re.findall(r"[a-z0-9]+", text.lower())
        found.update(zip(*(words[start:] for start in range(length)), strict=False))
    return found


def _rows(found: Sequence[str]) -> Iterator[str]:
    """Whole samples; the rest of a book that does not fill one is left."""
    row: list[str] = []
    for paragraph in found:
        row.append(paragraph)
        if sum(map(len, row)) >= ROW_CHARACTERS:
            yield "\n\n".join(row)
            row = []


def write_rows(division: Division, calibration: Path, held_out: Path) -> None:
    """Two .jsonl files, one {"text": ...} a line. ValueError where they share a run of words."""
    shared = runs(division.calibration) & runs(division.held_out)
    if shared:
        example = " ".join(min(shared))
        raise ValueError(f"calibration and held-out text share {len(shared)} runs: {example!r}")
    for file, rows in ((calibration, division.calibration), (held_out, division.held_out)):
        lines = (json.dumps({"text": row}) for row in rows)
        file.write_text("\n".join(lines) + "\n")
