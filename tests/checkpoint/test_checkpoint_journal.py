"""The journal: what is begun goes on, what is different is refused with its difference named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptq.checkpoint import journal as module
from ckptq.checkpoint.journal import Journal
from ckptq.checkpoint.partial import MARK, last_of, partial_of
from ckptq.errors import MachineError, UsageError

RUN = {"recipe": "fp8", "arguments": {"seed": 0, "ignore": []}}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begin(out: Path, *done: str, run: dict = RUN, restart: bool = False) -> Journal:
    journal = Journal.open(out, run, restart=restart)
    if done:
        journal.record({key: {} for key in done})
    return journal


def interrupted(out: Path, *done: str) -> Path:
    """A run that did these units and died; its journal."""
    begin(out, *done).close()
    return partial_of(out) / "journal.jsonl"


def refusal(out: Path, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        begin(out, **kwargs)
    return str(caught.value)


def test_a_run_from_begin_to_end(out):
    journal = begin(out)
    assert journal.done == {}
    (journal.scratch / "config.json").write_text("{}")
    assert not out.exists()
    journal.publish([], ["config.json"])
    journal.close()
    assert (out / "config.json").read_text() == "{}"
    assert os.listdir(out.parent) == ["out"]


def test_the_same_run_goes_on(out):
    interrupted(out, "a", "b")
    journal = begin(out, "c")
    assert set(journal.done) == {"a", "b", "c"}
    journal.close()
    assert set(begin(out).done) == {"a", "b", "c"}


@pytest.mark.parametrize("cut", range(1, 18))
def test_a_torn_line_was_not_recorded(out, cut):
    file = interrupted(out, "a")
    begin(out, "b").close()
    whole = file.read_bytes()
    assert whole.endswith(b'{"done": {"b": {}}}\n')
    file.write_bytes(whole[:-cut])
    journal = begin(out, "c")
    assert set(journal.done) == {"a", "c"}
    journal.close()
    assert set(begin(out).done) == {"a", "c"}, "the torn line must not swallow the next one"


def test_a_journal_torn_in_its_first_line_begins_anew(out):
    file = interrupted(out, "a")
    (partial_of(out) / "checkpoint" / "m.safetensors").write_text("")
    file.write_bytes(file.read_bytes()[:20])
    journal = begin(out)
    assert journal.done == {}
    assert list(journal.scratch.iterdir()) == []


def test_a_damaged_journal_says_so(out):
    file = interrupted(out, "a")
    file.write_bytes(file.read_bytes() + b"}}\n")
    with pytest.raises(MachineError, match=r"damaged.*--restart"):
        begin(out)
    assert begin(out, restart=True).done == {}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"recipe": "int4"}, 'recipe was "fp8", is "int4"'),
        ({"arguments": {"seed": 1, "ignore": []}}, "arguments.seed was 0, is 1"),
        ({"arguments": {"seed": 0, "ignore": ["x"]}}, 'arguments.ignore was [], is ["x"]'),
        ({"arguments": {"ignore": []}}, "arguments.seed was 0, is null"),
        ({"recipe": "fp8" * 100}, 'recipe was "fp8", is "fp8fp8'),
    ],
)
def test_a_different_run_is_refused_with_the_difference_named(out, changed, named):
    file = interrupted(out, "a")
    before = file.read_bytes()
    message = refusal(out, run=RUN | changed)
    assert named in message
    assert "--restart" in message
    assert len(message) < 500
    assert file.read_bytes() == before, "a refused run leaves everything as it was"
    assert set(begin(out).done) == {"a"}


def test_a_run_that_failed_before_any_work_is_in_nobodys_way(out):
    interrupted(out)
    (partial_of(out) / "checkpoint" / "model.safetensors").write_text("room for tensors")
    (partial_of(out) / "calibration").mkdir()
    (partial_of(out) / "calibration" / "run.json").write_text("{}")
    journal = begin(out, run=RUN | {"recipe": "int4"})
    assert list(journal.scratch.iterdir()) == []
    assert not journal.calibration.exists()
    assert '"int4"' in (partial_of(out) / "journal.jsonl").read_text()


@pytest.mark.parametrize("work", ["calibration/layer-00001/batch", "calibration/s", "oneshot/done"])
def test_a_different_run_is_refused_where_the_first_has_worked(out, work):
    interrupted(out)
    file = partial_of(out) / work
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert 'recipe was "fp8", is "int4"' in refusal(out, run=RUN | {"recipe": "int4"})
    assert file.exists()


def test_restart_begins_anew(out):
    interrupted(out, "a")
    (partial_of(out) / "checkpoint" / "old").write_text("")
    (partial_of(out) / "calibration").mkdir()
    (partial_of(out) / "calibration" / "layer-0").write_text("")
    journal = begin(out, run=RUN | {"recipe": "int4"}, restart=True)
    assert journal.done == {}
    assert list(journal.scratch.iterdir()) == []
    assert not journal.calibration.exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_an_output_that_exists_is_refused_and_left_alone(out, kind):
    if kind == "folder":
        out.mkdir()
        (out / "precious").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to("nothing")
    for restart in (False, True):
        assert "already exists" in refusal(out, restart=restart)
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("made", ["folder", "empty folder", "file"])
@pytest.mark.parametrize("when", ["before the rename", "at the rename", "after a rename"])
def test_an_output_that_somebody_else_made_is_refused_and_the_work_kept(out, made, when):
    """Existence proves nothing: published is what this run has renamed."""
    journal = begin(out, "a")
    (journal.scratch / "config.json").write_text("{}")
    if when != "before the rename":
        make(out, made)
        with pytest.raises(UsageError, match=r"already exists, but was not made by the run"):
            journal.publish([], ["config.json"])
    journal.close()
    if when == "before the rename":
        make(out, made)
    before = sorted(str(p) for p in out.parent.rglob("*"))
    for restart in (False, True):
        assert "whose work is kept" in refusal(out, restart=restart)
    assert sorted(str(p) for p in out.parent.rglob("*")) == before
    out.rename(out.with_name("theirs"))
    again = begin(out)
    assert set(again.done) == {"a"}
    again.publish([], ["config.json"])
    assert (out / "config.json").read_text() == "{}"


def make(out: Path, what: str) -> None:
    if what == "file":
        out.write_text("theirs")
        return
    out.mkdir()
    if what == "folder":
        (out / "theirs").write_text("x")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["folder", "with a lock", "with a journal", "link", "file"])
def test_a_folder_that_no_run_has_made_is_refused_and_left_alone(out, tmp_path, kind, restart):
    partial, thesis = partial_of(out), tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "a.txt").write_text("mine")
    if kind == "link":
        partial.symlink_to(thesis)
    elif kind == "file":
        partial.write_text("mine")
    else:
        shutil.copytree(thesis, partial / "checkpoint")
        if kind == "with a lock":
            (partial / "lock").write_text("")
        elif kind == "with a journal":
            (partial / "journal.jsonl").write_text('{"run": {}}\n')
    before = {str(p): p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    assert "move it away, or choose another output" in refusal(out, restart=restart)
    assert {str(p): p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["checkpoint", "calibration"])
def test_a_link_in_the_folder_of_a_run_is_refused_and_not_followed(out, tmp_path, name):
    interrupted(out)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "a.txt").write_text("mine")
    shutil.rmtree(partial_of(out) / name, ignore_errors=True)
    (partial_of(out) / name).symlink_to(thesis)
    for restart in (False, True):
        assert f"{name}: is a link" in refusal(out, restart=restart)
    assert (thesis / "a.txt").read_text() == "mine"


@pytest.mark.parametrize("left", ["nothing", "empty lock", "half a mark", "zeros"])
def test_a_run_that_died_before_its_mark_was_whole_is_in_nobodys_way(out, left):
    partial = partial_of(out)
    partial.mkdir()
    if left != "nothing":
        (partial / "lock").write_bytes({"empty lock": b"", "zeros": bytes(50)}.get(left, MARK[:9]))
    begin(out).close()
    assert (partial / "lock").read_bytes() == MARK


def test_what_a_user_has_put_beside_the_run_stays(out):
    journal = begin(out, "a")
    (journal.scratch / "config.json").write_text("{}")
    (journal.partial / "thesis.txt").write_text("mine")
    journal.publish([], ["config.json"])
    journal.close()
    assert (out / "config.json").exists()
    assert [p.name for p in partial_of(out).iterdir()] == ["thesis.txt"]


def test_what_a_user_has_put_into_the_output_in_the_making_is_not_published(out):
    journal = begin(out, "a")
    (journal.scratch / "config.json").write_text("{}")
    (journal.scratch / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis.txt: not written by this run; move it away"):
        journal.publish([], ["config.json"])
    assert not out.exists()
    (journal.scratch / "thesis.txt").unlink()
    journal.publish([], ["config.json"])
    journal.close()
    assert [p.name for p in out.iterdir()] == ["config.json"]


def test_work_without_a_journal_is_not_thrown_away_unasked(out):
    file = interrupted(out)
    state = partial_of(out) / "calibration" / "layer-00001" / "batch"
    state.parent.mkdir(parents=True)
    state.write_text("hours")
    file.unlink()
    assert "has lost its journal; --restart" in refusal(out)
    assert state.exists()
    begin(out, restart=True).close()
    assert not state.exists()


@pytest.mark.parametrize(
    "line", [b"[]", b'"x"', b"3", b'{"done": 3}', b'{"publishing": 1}', b"\xff", b"[" * 100_000]
)
def test_a_journal_that_says_anything_else_is_damaged(out, line):
    file = interrupted(out, "a")
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(MachineError, match=r"damaged.*--restart"):
        begin(out)


HOLD = """
import sys
from pathlib import Path
from ckptq.checkpoint.journal import Journal
journal = Journal.open(Path(sys.argv[1]), {"recipe": "fp8", "arguments": {"seed": 0, "ignore": []}})
journal.record({"theirs": {}})
print("holding", flush=True)
sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_went(out):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"holding\n"
    for restart in (False, True):
        assert "another run" in refusal(out, restart=restart)
    other.kill()
    other.wait()
    assert set(begin(out).done) == {"theirs"}


CLEANUP = {
    "folders": (shutil, "rmtree", 1),
    "journal": (Path, "rename", 1),
    "lock": (Path, "unlink", 1),
    "folder": (Path, "rmdir", 1),
    "last": (Path, "unlink", 2),
}
"""What goes, in this order -> the call that removes it, and which one of its kind."""


def published(out: Path, monkeypatch, at: str, *done: str) -> None:
    """A run that was killed in the cleanup."""
    journal = begin(out, *done)
    journal.calibration.mkdir()
    (journal.scratch / "config.json").write_text("{}")
    place, name, number = CLEANUP[at]
    call, calls = getattr(place, name), []

    def die_at(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return die() if len(calls) == number else call(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, die_at)
        with pytest.raises(Killed):
            journal.publish([], ["config.json"])
    journal.close()


@pytest.mark.parametrize("at", CLEANUP)
def test_killed_between_the_rename_and_the_end_of_the_cleanup(out, monkeypatch, at):
    published(out, monkeypatch, at, "a")
    assert partial_of(out).exists() == (at != "last")
    assert len(os.listdir(out.parent)) > 1
    again = begin(out)
    assert again.renamed
    again.publish([], [])
    again.close()
    assert os.listdir(out.parent) == ["out"]
    assert (out / "config.json").exists()


@pytest.mark.parametrize("done", [["a"], []], ids=["work", "no work"])
@pytest.mark.parametrize("at", CLEANUP)
def test_what_another_run_has_published_is_not_this_one_s(out, monkeypatch, at, done):
    """Also where it had no unit to do, because all of its shards were linked."""
    published(out, monkeypatch, at, *done)
    assert 'recipe was "fp8", is "int4"' in refusal(out, run=RUN | {"recipe": "int4"})
    assert (out / "config.json").exists()


@pytest.mark.parametrize("at", CLEANUP)
def test_an_output_that_was_removed_is_made_again(out, monkeypatch, at):
    published(out, monkeypatch, at)
    shutil.rmtree(out)
    journal = begin(out, "b")
    assert not journal.renamed
    (journal.scratch / "config.json").write_text("{}")
    journal.publish([], ["config.json"])
    assert os.listdir(out.parent) == ["out"]


def test_a_link_in_the_place_of_the_last_journal_is_not_followed(out, tmp_path):
    interrupted(out, "a")
    (partial_of(out) / "journal.jsonl").rename(tmp_path / "mine")
    shutil.rmtree(partial_of(out))
    last_of(partial_of(out)).symlink_to(tmp_path / "mine")
    out.mkdir()
    assert "already exists" in refusal(out)
    assert (tmp_path / "mine").exists()
    assert last_of(partial_of(out)).is_symlink()


def test_what_is_no_journal_is_not_touched_in_the_place_of_the_last_one(out):
    theirs = last_of(partial_of(out))
    out.parent.mkdir(exist_ok=True)
    theirs.write_text("notes\n")
    journal = begin(out, "a")
    (journal.scratch / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not a journal, but has the name that this run's needs"):
        journal.publish([], ["config.json"])
    journal.close()
    assert theirs.read_text() == "notes\n"
    theirs.rename(out.parent / "notes")
    again = begin(out)
    assert again.renamed
    again.publish([], [])
    assert sorted(os.listdir(out.parent)) == ["notes", "out"]


def test_killed_between_the_last_record_and_the_rename(out, monkeypatch):
    journal = begin(out, "a")
    with monkeypatch.context() as patched:
        patched.setattr(module, "rename_new", die)
        with pytest.raises(Killed):
            journal.publish([], [])
    journal.close()
    assert not out.exists()
    again = begin(out)
    assert not again.renamed
    assert set(again.done) == {"a"}
    again.publish([], [])
    assert os.listdir(out.parent) == ["out"]


class Killed(BaseException):
    pass


def die(*_: object, **__: object) -> None:
    raise Killed


def test_everything_is_on_the_disk_before_the_rename(out, monkeypatch):
    """Every file and folder of the scratch folder was synced after its last change."""
    journal = begin(out)
    (journal.scratch / "sub").mkdir()
    synced: list[str] = []
    fsync, rename = os.fsync, module.rename_new
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )

    def checked(source: Path, target: Path) -> None:
        assert {str(source), str(source / "sub")} <= set(synced)
        assert str(partial_of(out) / "journal.jsonl") in synced
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(module, "rename_new", checked)
    journal.publish([], [])
    assert synced[0] == str(out.parent), "the rename itself is made to last before the cleanup"


def test_the_journal_is_lines_of_json(out):
    file = interrupted(out, "a", "b")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"run": RUN}, {"done": {"a": {}, "b": {}}}]


def test_restart_says_what_is_in_its_way_where_the_journal_is_damaged_too(out):
    """Killed after the rename, and damaged: "--restart begins anew" was all that it ever said."""
    begin(out, "a").close()
    (partial_of(out) / "journal.jsonl").write_bytes(b"\x89")
    out.mkdir()
    with pytest.raises(UsageError, match=r"already exists.*move it away"):
        begin(out, restart=True)
    out.rmdir()
    begin(out, restart=True).close()
