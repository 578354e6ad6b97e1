"""Calibration and held-out text never meet."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import prose

WORDS = [f"{first}{second}" for first in "bdfgklmn" for second in ("ale", "ine", "ost", "umber")]


def sentence(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)).capitalize() + "."


def book(seed: int, paragraphs: int = 200) -> str:
    """Paragraphs of their own, in lines as an etext has them."""
    made = (sentence(seed * 1000 + number) for number in range(paragraphs))
    return "\r\n\r\n".join(each.replace(" ", "\r\n", 1) for each in made)


def text_of(file: Path) -> list[str]:
    return [json.loads(row)["text"] for row in file.read_text().splitlines()]


def test_only_prose_is_kept_and_each_paragraph_is_one_line():
    heading, table = "CHAPTER I", " ".join("12.5" for _ in range(60)) + "."
    contents = sentence(3)[:-1]
    whole = "\r\n\r\n".join([heading, sentence(1).replace(" ", "\r\n"), table, contents])
    assert prose.paragraphs(whole) == [sentence(1)]


def test_the_first_part_of_each_book_calibrates_and_the_last_is_held_out():
    books = [book(1), book(2)]
    found = prose.divide(books, held_out_share=0.25)
    assert found.calibration[0].startswith(sentence(1000))
    assert found.held_out[0].startswith(sentence(1150))
    assert any(sentence(2000) in row for row in found.calibration)
    assert all(len(row) >= prose.ROW_CHARACTERS for row in found.calibration + found.held_out)


def test_a_paragraph_that_returns_is_not_held_out():
    refrain = sentence(7)
    shifted = f"Then they sang once more: {refrain}"
    parted = prose.divide(["\n\n".join([refrain, book(1), shifted])], held_out_share=0.25)
    assert not any(refrain in row for row in parted.held_out)
    assert prose.divide(["\n\n".join([book(1), shifted])]).held_out != ()


@pytest.mark.parametrize("spelling", [str.upper, lambda text: text.replace(" ", ", ")])
def test_runs_are_found_whatever_the_spelling(spelling):
    assert prose.runs([sentence(1)]) == prose.runs([spelling(sentence(1))])
    assert not prose.runs([sentence(1)]) & prose.runs([sentence(2)])


def test_texts_that_meet_are_not_written(tmp_path):
    calibration, held_out = tmp_path / "calibration.jsonl", tmp_path / "held-out.jsonl"
    good = prose.divide([book(1)])
    prose.write_rows(good, calibration, held_out)
    assert text_of(calibration) == list(good.calibration)
    assert text_of(held_out) == list(good.held_out)

    stolen = " ".join(good.calibration[3].split()[10 : 10 + prose.RUN])
    meeting = prose.Division(good.calibration, (f"And so {stolen} again.",))
    before = held_out.read_bytes()
    with pytest.raises(ValueError, match="share 1 runs"):
        prose.write_rows(meeting, calibration, held_out)
    assert held_out.read_bytes() == before


def test_a_book_of_one_paragraph_is_refused():
    with pytest.raises(ValueError, match="book 2 has 1 paragraphs"):
        prose.divide([book(1), sentence(9)])
