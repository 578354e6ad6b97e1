"""A tokenizer.json against the source's: what cuts text otherwise is a fault, layout a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptq.verify.structure.vocabulary import unlike_parts

BASE: dict[str, Any] = {
    "truncation": None, "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "ByteLevel"},
    "decoder": {"type": "ByteLevel"}, "post_processor": None, "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
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
