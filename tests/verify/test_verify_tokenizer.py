"""A tokenizer.json against the source's: what cuts text otherwise is a fault, layout a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ckptq.verify.structure.vocabulary import FLAGS, unlike_parts

BASE: dict[str, Any] = {
    "truncation": None, "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "ByteLevel"},
    "decoder": {"type": "ByteLevel"}, "post_processor": None, "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}  # fmt: skip


LETTERS = ["a", "b", "c", "A", "B", "C", "<", ">", " "]
LOWER: dict[str, Any] = {
    "version": "1.0", "normalizer": {"type": "Lowercase"}, "pre_tokenizer": None, "decoder": None,
    "post_processor": None, "added_tokens": [],
    "model": {"type": "BPE", "vocab": {c: i + 10 for i, c in enumerate(LETTERS)}, "merges": []},
}  # fmt: skip


def files(folder: Path, **changes: Any) -> tuple[Path, Path]:
    other = {**BASE, **changes}
    for name, content in (("ours", other), ("theirs", BASE)):
        (folder / name).write_text(json.dumps(content))
    return folder / "ours", folder / "theirs"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": {**BASE["model"], "merges": []}}, "model.merges"),
        ({"model": {**BASE["model"], "byte_fallback": True}}, "model.byte_fallback"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"decoder": None}, "decoder"),
    ],
)
def test_what_cuts_text_otherwise(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert unlike_parts(*files(tmp_path, **changes)) == [part]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncation": {"max_length": 4}},
        {"model": {**BASE["model"], "merges": [["a", "b"]]}},
    ],
)
def test_layout_and_what_callers_set_are_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert unlike_parts(*files(tmp_path, **changes)) == []


def token(**flags: bool) -> dict[str, Any]:
    return {"id": 3, "content": "<abc>", **dict.fromkeys(FLAGS, False), **flags}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_added_tokens_cut_or_write_text_otherwise(tmp_path: Path, flag: str) -> None:
    """As the tokenizers library sees it too."""
    for name, on in (("ours", True), ("theirs", False)):
        (tmp_path / name).write_text(json.dumps(LOWER | {"added_tokens": [token(**{flag: on})]}))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert unlike_parts(ours, theirs) == [f"added_tokens['<abc>'].{flag}"]
    assert unlike_parts(ours, ours) == []
    assert seen(ours) != seen(theirs)


def test_flags_that_change_nothing_are_none(tmp_path: Path) -> None:
    """Normalized by no normalizer; a token that one of the two adds elsewhere; a flag left out."""
    for name, tokens in (
        ("ours", [token(normalized=True), {"id": 4, "content": "<b>", "lstrip": True}]),
        ("theirs", [{"id": 3, "content": "<abc>"}]),
    ):
        (tmp_path / name).write_text(
            json.dumps(BASE | {"normalizer": None, "added_tokens": tokens})
        )
    assert unlike_parts(tmp_path / "ours", tmp_path / "theirs") == []


def seen(file: Path) -> list[object]:
    """What it makes of some text, and writes again."""
    made = Tokenizer.from_file(str(file))
    codes = [made.encode(text) for text in ("ab <abc> ba", "ab<abc>ba", "a <ABC> b")]
    return [(code.tokens, made.decode(code.ids)) for code in codes]
