"""Marks: written, read, and obeyed; contradictions are named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptq.errors import SourceError, UsageError
from ckptq.permute import marks
from ckptq.permute.effect import Part
from ckptq.rope_order import RopeOrder

HALF, INTER = RopeOrder.HALF_SPLIT, RopeOrder.INTERLEAVED
WHOLE = dict.fromkeys(Part, HALF)
ALL_MARKS = st.dictionaries(st.sampled_from(Part), st.sampled_from(RopeOrder))


def files(found: marks.Marks) -> tuple[dict, dict]:
    config = marks.marked_config({"model_type": "llama4", "ckptq": {"version": "1"}}, found)
    shard = marks.marked_metadata({"format": "pt"}, found)
    return json.loads(json.dumps(config)), {"a.safetensors": shard, "b.safetensors": dict(shard)}


def test_spelling():
    assert marks.dump(WHOLE) == "half-split"
    assert marks.dump({Part.ZERO_POINTS: HALF, Part.SCALES: INTER}) == (
        "scales=interleaved zero-points=half-split"
    )


@given(ALL_MARKS)
def test_marks_survive_writing(found):
    assert marks.parse(marks.dump(found), "here") == found
    config, metadata = files(found)
    assert marks.read(config, metadata) == found
    assert config["ckptq"]["version"] == "1"
    assert metadata["a.safetensors"]["format"] == "pt"


def test_a_checkpoint_without_marks():
    assert marks.read({}, {"model.safetensors": {"format": "pt"}}) == {}


@pytest.mark.parametrize("text", ["sideways", "weights=", "half-split interleaved", "weights"])
def test_misspelt_marks(text):
    with pytest.raises(SourceError, match="shard-1: "):
        marks.parse(text, "shard-1")
    with pytest.raises(SourceError, match=r"b\.safetensors"):
        marks.read({}, {"b.safetensors": {marks.METADATA_KEY: text}})


@pytest.mark.parametrize("section", ["half-split", {"rope_order": ["half-split"]}, 3])
def test_misshapen_config_marks(section):
    with pytest.raises(SourceError, match=r"config\.json"):
        marks.read({"ckptq": section}, {})


def test_a_part_named_twice():
    with pytest.raises(SourceError):
        marks.parse("weights=half-split weights=interleaved", "shard")


def test_contradictions_name_the_file():
    config, metadata = files(WHOLE)
    metadata["b.safetensors"] = {"format": "pt"}
    with pytest.raises(SourceError, match=r"b\.safetensors is marked 'nothing'"):
        marks.read(config, metadata)
    metadata["b.safetensors"] = {marks.METADATA_KEY: "interleaved"}
    with pytest.raises(SourceError, match=r"b\.safetensors is marked 'interleaved'"):
        marks.read(config, metadata)


def test_twice_is_refused_and_back_is_not():
    there = marks.applied({}, HALF, Part, family=INTER)
    assert there == WHOLE
    with pytest.raises(UsageError, match="already in half-split order"):
        marks.applied(there, HALF, Part, family=INTER)
    with pytest.raises(UsageError, match="scales: already in half-split"):
        marks.applied(there, HALF, {Part.SCALES}, family=INTER)
    assert marks.applied(there, INTER, Part, family=INTER) == dict.fromkeys(Part, INTER)


def test_the_published_order_counts_for_a_whole_unmarked_checkpoint():
    with pytest.raises(UsageError, match="already in interleaved order"):
        marks.applied({}, INTER, Part, family=INTER)


def test_a_part_alone_is_believed_to_need_it():
    """Somebody else permuted the weights and forgot the scales: both repairs must be possible."""
    assert marks.applied({}, HALF, {Part.SCALES}, family=INTER) == {Part.SCALES: HALF}
    assert marks.applied({}, INTER, {Part.WEIGHTS}, family=INTER) == {Part.WEIGHTS: INTER}


def test_parts_add_up():
    found: marks.Marks = {}
    for part in Part:
        found = marks.applied(found, HALF, {part})
    assert marks.dump(found) == "half-split"
    with pytest.raises(UsageError):
        marks.applied({Part.SCALES: HALF}, HALF, Part)


def test_transformers_keeps_the_mark(tmp_path):
    from transformers import AutoConfig, LlamaConfig

    config = marks.marked_config(LlamaConfig().to_dict(), WHOLE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert marks.read(saved, {}) == WHOLE
