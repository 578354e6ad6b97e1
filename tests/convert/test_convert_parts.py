"""`--part` and `--join`: the bytes of one process, or a refusal that names the part."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_cases import LAYOUTS, recipe_of, save
from convert_killed import Run, convert, digests, perform

from ckptq.checkpoint.partial import partial_of
from ckptq.convert.division.parts import RECORD, Part
from ckptq.convert.output import RunOptions
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import SourceError, UsageError
from ckptq.recipes.load import load_scheme

PARTS = [Part(number, 3) for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    layout = LAYOUTS["llama4"]()
    more = {"model.embed_tokens.weight": torch.randn(200, 128).bfloat16()}
    source = save(folder / "source", replace(layout, tensors=layout.tensors | more))
    run = Run(source=source, out=folder / "whole", recipe=recipe_of("int4 group asym"))
    convert(run)
    assert len(list(run.out.glob("*.safetensors"))) >= 4
    return run


@pytest.fixture
def parts(whole, tmp_path) -> Run:
    """All parts, made and not joined."""
    run = replace(whole, out=tmp_path / "out")
    for part in PARTS:
        convert(replace(run, part=part))
    return run


def joined(whole: Run, run: Run, note=lambda line: None) -> None:
    convert(replace(run, join=True), note)
    assert digests(run.out) == digests(whole.out)
    assert [path.name for path in run.out.parent.iterdir()] == [run.out.name]


def test_parts_joined_are_the_bytes_of_one_process(whole, parts):
    shards = [p.name for part in PARTS for p in part.folder(parts.out).glob("*.safetensors")]
    assert sorted(shards) == sorted(p.name for p in whole.out.glob("*.safetensors"))
    joined(whole, parts)


def test_more_parts_than_shards(whole, tmp_path):
    run = replace(whole, out=tmp_path / "out")
    for number in range(1, 10):
        convert(replace(run, part=Part(number, 9)))
    joined(whole, run)


def test_a_part_that_is_missing_or_unfinished_is_named(whole, parts):
    second = PARTS[1].folder(parts.out)
    shutil.rmtree(second)
    with pytest.raises(UsageError, match=r"out.part-2-of-3: part 2/3 is missing.*--part 2/3"):
        convert(replace(parts, join=True))
    code, _ = perform(replace(parts, part=PARTS[1], die_at=20, die_in="pwrite"))
    assert code == -signal.SIGKILL
    with pytest.raises(UsageError, match="part 2/3 is not finished"):
        convert(replace(parts, join=True))
    convert(replace(parts, part=PARTS[1]))
    joined(whole, parts)


def test_parts_of_different_runs_are_refused(whole, parts):
    with pytest.raises(UsageError, match=r"part 1/3 was made by a different run: recipe was"):
        convert(replace(parts, join=True, recipe=recipe_of("int8 channel")))
    convert(replace(parts, part=Part(1, 2)))
    with pytest.raises(UsageError, match="parts of divisions by 2 and 3"):
        convert(replace(parts, join=True))


def test_none_are_refused(whole, tmp_path):
    with pytest.raises(UsageError, match="no part"):
        convert(replace(whole, out=tmp_path / "out", join=True))


def test_a_damaged_shard_is_made_again_and_a_damaged_record_refused(whole, parts):
    shard = next(PARTS[0].folder(parts.out).glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"damaged")
    record = PARTS[2].folder(parts.out) / RECORD
    kept = record.read_bytes()
    record.write_text("{}")
    with pytest.raises(SourceError, match=r"part.json: damaged"):
        convert(replace(parts, join=True))
    record.write_bytes(kept)
    told: list[str] = []
    joined(whole, parts, told.append)
    assert any("1 finished unit on disk differ" in line for line in told)


@pytest.mark.parametrize("die_in", ["replace", "unlink", "rmdir", "fsync", "rename_new"])
def test_a_join_that_is_killed_goes_on(whole, parts, die_in):
    at = {"replace": 2, "fsync": 6}.get(die_in, 1)
    code, _ = perform(replace(parts, join=True, die_at=at, die_in=die_in))
    assert code == -signal.SIGKILL
    joined(whole, parts)


def test_what_is_no_part_is_refused():
    for text in ("0/3", "4/3", "3", "a/b", "-1/3", "1/0"):
        with pytest.raises(UsageError, match="expected a part and their number"):
            Part.parse(text)
    assert Part.parse("3/16") == Part(3, 16)


def test_calibration_in_every_part_is_refused(whole, tmp_path):
    request = QuantizeRequest(
        model=whole.source,
        recipe=load_scheme("FP8"),
        out=tmp_path / "out",
        options=RunOptions(device="cpu", part=Part(1, 2)),
    )
    with pytest.raises(UsageError, match="with --scales, or drop --part"):
        quantize(request)
    assert not partial_of(Part(1, 2).folder(tmp_path / "out")).exists()


def test_the_record_says_what_the_part_depends_on(parts):
    record = json.loads((PARTS[0].folder(parts.out) / RECORD).read_text())
    assert set(record) == {"run", "done"}
    assert record["run"]["source"]["files"]
    assert Path(parts.source).name == record["run"]["source"]["name"]
