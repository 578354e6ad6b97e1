"""The source is the same file from the plan to the last byte, or the run says that it is not."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_cases import LAYOUTS, recipe_of, save
from convert_killed import digests

from ckptq.checkpoint.open import open_checkpoint
from ckptq.checkpoint.partial import partial_of
from ckptq.convert import output
from ckptq.convert.output import RunOptions
from ckptq.convert.run import write_quantized
from ckptq.errors import SourceError, UsageError
from ckptq.plan.make import make_plan

RECIPE = recipe_of("fp8 channel")
FIRST = "model-00001-of-00002.safetensors"
TICK = 0.02
"""Seconds; the clock that stamps files may stand still for some milliseconds."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = save(tmp_path / "source", LAYOUTS["llama4"]())
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    time.sleep(TICK)
    return folder


def quantize(source: Path, out: Path, during: Callable[[], None] | None = None):
    """`during` is called once, when the first unit is done."""
    ckpt = open_checkpoint(source)
    todo = [during] if during is not None else []

    def begin(task: str, total: int, unit: str = "bytes"):
        def report(what: str, done: int) -> None:
            if todo:
                todo.pop()()

        return report

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(output, "COMMIT_BYTES", 10_000)
        return write_quantized(
            ckpt, make_plan(ckpt, RECIPE), out, arguments={}, begin=begin,
            options=RunOptions(workers=1),
        )  # fmt: skip


def edit_in_place(file: Path) -> None:
    """Other bytes, and the same size and time of modification as before."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as handle:
        handle.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_size == before.st_size


def replace_file(file: Path) -> None:
    """Another file under the name, with the same size and time."""
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(bytes(before.st_size - 9) + file.read_bytes()[-9:])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)


def append(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b" ")


EDITS = {
    "written to": edit_in_place,
    "it was replaced by another file": replace_file,
    "its size changed": append,
}
FILES = (FIRST, "model.safetensors.index.json", "config.json", "tokenizer.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("what", EDITS)
def test_a_source_that_changes_while_it_is_read_is_refused(source, tmp_path, file, what):
    refused = pytest.raises(SourceError, match=rf"{file}: changed while it was read: .*{what}")
    with refused:
        quantize(source, tmp_path / "out", during=lambda: EDITS[what](source / file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", EDITS)
def test_a_shard_that_changes_after_the_plan_is_refused(source, tmp_path, what):
    ckpt = open_checkpoint(source)
    plan = make_plan(ckpt, RECIPE)
    EDITS[what](source / FIRST)
    with pytest.raises(SourceError, match=rf"{FIRST}: changed while it was read: .*{what}"):
        write_quantized(ckpt, plan, tmp_path / "out", arguments={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", FILES)
def test_an_edit_between_two_lives_of_a_run_is_refused(source, tmp_path, file):
    quantize(source, tmp_path / "whole")
    interrupted(source, tmp_path / "out")
    shutil.copytree(partial_of(tmp_path / "out"), tmp_path / "kept")
    edit_in_place(source / file)
    with pytest.raises(
        (UsageError, SourceError), match=r"started by a different run|not valid JSON"
    ):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert digests(partial_of(tmp_path / "out")) == digests(tmp_path / "kept")


def test_a_source_that_is_only_read_is_the_same(source, tmp_path):
    """The twin of all these: other readers, and times of access, change nothing."""
    quantize(source, tmp_path / "whole")

    def look() -> None:
        for file in source.iterdir():
            file.read_bytes()

    interrupted(source, tmp_path / "out")
    quantize(source, tmp_path / "out", during=look)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_side_file_that_comes_later_is_not_of_the_source(source, tmp_path):
    note = source / "note.txt"
    quantize(source, tmp_path / "out", during=lambda: note.write_text("x"))
    assert not (tmp_path / "out" / "note.txt").exists()


class Killed(BaseException):
    pass


def interrupted(source: Path, out: Path) -> None:
    """A run that died with some units done."""
    reports = []

    def begin(task: str, total: int, unit: str = "bytes"):
        def report(what: str, done: int) -> None:
            reports.append(what)
            if len(reports) == 12:
                raise Killed

        return report

    ckpt = open_checkpoint(source)
    plan, options = make_plan(ckpt, RECIPE), RunOptions(workers=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(output, "COMMIT_BYTES", 1)
        with pytest.raises(Killed):
            write_quantized(ckpt, plan, out, arguments={}, options=options, begin=begin)
    lines = [json.loads(x) for x in (partial_of(out) / "journal.jsonl").read_text().splitlines()]
    assert any("done" in line for line in lines)
