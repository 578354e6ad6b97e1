"""A run that is killed at any step goes on, and ends byte-identical to one that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_cases import LAYOUTS, recipe_of, save
from convert_killed import INTERRUPTED, Run, convert, digests, perform

from ckptq.checkpoint.partial import partial_of
from ckptq.errors import MachineError, UsageError


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Run, int]:
    """A run that went through, and its number of steps."""
    folder = tmp_path_factory.mktemp("killed")
    torch.manual_seed(0)
    layout = LAYOUTS["llama4"]()
    source = save(folder / "source", replace(layout, tensors=layout.tensors | more(layout)))
    run = Run(source=source, out=folder / "whole", recipe=recipe_of("int4 group asym"))
    code, steps = perform(run)
    assert code == 0
    assert steps > 300
    assert len(list(run.out.glob("*.safetensors"))) >= 4
    return run, steps


def more(layout) -> dict[str, torch.Tensor]:
    """Tensors to copy, so that a run has steps of every kind."""
    return {"model.embed_tokens.weight": torch.randn(200, 128).bfloat16()}


def resumed(run: Run) -> None:
    """Finish an interrupted run and hold the result against the uninterrupted one."""
    convert(run)
    assert digests(run.out) == digests(run.out.with_name("whole"))
    assert not partial_of(run.out).exists()
    shutil.rmtree(run.out)


@pytest.mark.parametrize("case", range(20))
def test_killed_at_a_random_step(uninterrupted, case):
    run, steps = uninterrupted
    # not the very last ones: how often is committed, and so how many there are, is a matter of time
    die_at = random.Random(case).randrange(1, steps * 9 // 10)
    by = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[case % 4]
    run = replace(run, out=run.out.with_name(f"killed-{case}"), die_at=die_at, by=by)
    code, _ = perform(run)
    assert code == (-signal.SIGKILL if by == signal.SIGKILL else INTERRUPTED)
    assert not run.out.exists()
    resumed(run)


def test_killed_again_and_again(uninterrupted):
    run, steps = uninterrupted
    run = replace(run, out=run.out.with_name("again"))
    rng, lives = random.Random(0), 0
    while not run.out.exists():
        perform(replace(run, die_at=rng.randrange(10, steps // 3), workers=1 + lives % 4))
        lives += 1
        assert lives < 50, "every life must bring the run forward"
    assert lives > 3
    assert digests(run.out) == digests(run.out.with_name("whole"))
    shutil.rmtree(run.out)


LAST = 12
"""Steps from the rename on, and some before."""


@pytest.fixture(scope="module")
def complete(uninterrupted) -> Run:
    """A run that had everything on the disk and died before the rename that publishes it."""
    run, _ = uninterrupted
    run = replace(run, out=run.out.with_name("complete"), die_at=1, die_in="rename_new")
    assert perform(run)[0] == -signal.SIGKILL
    assert not run.out.exists()
    return run


def test_killed_at_each_of_the_last_steps(complete):
    """Documents, syncs, the rename, the cleanup: at every fourth one until it, then at each."""
    finish = replace(complete, die_in=None, die_at=None, out=complete.out.with_name("last"))

    def die(at: int | None) -> int:
        shutil.copytree(partial_of(complete.out), partial_of(finish.out))
        return perform(replace(finish, die_at=at))[0]

    shutil.copytree(partial_of(complete.out), partial_of(finish.out))
    code, steps = perform(finish)
    assert code == 0
    assert 20 < steps < 80, "no unit may be done again"
    shutil.rmtree(finish.out)
    after_the_rename = 0
    for at in range(1, steps + 1):
        if at % 4 and at < steps - LAST:
            continue
        assert die(at) == -signal.SIGKILL
        if finish.out.exists():
            after_the_rename += 1
        resumed(finish)
    assert after_the_rename >= 4


def test_bytes_that_never_reached_the_disk_are_made_again(uninterrupted):
    """Power fails: what was written and not yet recorded may be anything."""
    run, steps = uninterrupted
    run = replace(run, out=run.out.with_name("power"), die_at=steps // 2)
    assert perform(run)[0] == -signal.SIGKILL
    scratch = partial_of(run.out)
    lines = (scratch / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (scratch / "journal.jsonl").write_bytes(b"".join(lines[:1]))
    for file in (scratch / "checkpoint").iterdir():
        file.write_bytes(os.urandom(file.stat().st_size))
    resumed(run)


DAMAGE = {
    "other bytes": lambda file: file.write_bytes(os.urandom(file.stat().st_size)),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a hole": lambda file: write_zeros(file, file.stat().st_size - 5000, 4000),
    "one bit": lambda file: flip(file, file.stat().st_size - 1),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "cut to nothing": lambda file: os.truncate(file, 0),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 100),
    "gone": lambda file: file.unlink(),
}


def write_zeros(file: Path, at: int, count: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(at)
        handle.write(bytes(count))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def left_behind(complete: Run, name: str) -> tuple[Run, list[Path]]:
    """A copy of the complete run, and its shards."""
    run = replace(complete, out=complete.out.with_name(name))
    shutil.copytree(partial_of(complete.out), partial_of(run.out))
    return run, sorted((partial_of(run.out) / "checkpoint").glob("*.safetensors"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", [0, -1])
def test_a_recorded_unit_is_proved_before_it_is_trusted(complete, damage, which):
    run, shards = left_behind(complete, "damaged")
    DAMAGE[damage](shards[which])
    told: list[str] = []
    convert(run, note=told.append)
    assert digests(run.out) == digests(run.out.with_name("whole"))
    shutil.rmtree(run.out)
    again = [line for line in told if "differ from what was written" in line]
    assert bool(again) == (damage != "longer"), "what is not part of a unit needs no unit again"


def test_a_shard_that_is_another_file_s_too_is_not_written(complete, tmp_path):
    run, shards = left_behind(complete, "linked")
    other = tmp_path / "other.safetensors"
    other.write_bytes(os.urandom(shards[0].stat().st_size))
    before = other.read_bytes()
    shards[0].unlink()
    os.link(other, shards[0])
    with pytest.raises(UsageError, match=f"{shards[0].name}: is a hard link to another file"):
        convert(run)
    assert other.read_bytes() == before
    shards[0].unlink()
    convert(run)
    assert digests(run.out) == digests(run.out.with_name("whole"))
    shutil.rmtree(run.out)


def test_what_is_proved_is_not_made_again(complete):
    """The twin of the test above."""
    run, _ = left_behind(complete, "proved")
    told: list[str] = []
    result = convert(run, note=told.append)
    assert result.resumed_units > 10
    assert told == []
    assert digests(run.out) == digests(run.out.with_name("whole"))
    shutil.rmtree(run.out)


def test_a_shard_that_is_a_link_is_not_written_through(complete, tmp_path):
    run, shards = left_behind(complete, "linked")
    (tmp_path / "thesis").write_text("mine")
    shards[0].unlink()
    shards[0].symlink_to(tmp_path / "thesis")
    with pytest.raises(MachineError, match=shards[0].name):
        convert(run)
    assert (tmp_path / "thesis").read_text() == "mine"
    shutil.rmtree(partial_of(run.out))


@pytest.fixture(scope="module")
def renamed(complete) -> Run:
    """A run that died between the rename that publishes it and the end of the cleanup."""
    run, _ = left_behind(complete, "renamed")
    assert perform(replace(run, die_in="rename", die_at=1))[0] == -signal.SIGKILL
    assert run.out.exists()
    assert (partial_of(run.out) / "journal.jsonl").exists()
    return run


def moved(renamed: Run, name: str) -> Run:
    run = replace(renamed, out=renamed.out.with_name(name), die_at=None, die_in=None)
    shutil.copytree(renamed.out, run.out)
    shutil.copytree(partial_of(renamed.out), partial_of(run.out))
    return run


@pytest.mark.parametrize("file", ["config.json", "README.md", "first shard", "last shard"])
def test_a_published_folder_that_is_not_what_was_written_is_refused(renamed, file):
    run = moved(renamed, "touched")
    shards = sorted(run.out.glob("*.safetensors"))
    touched = {"first shard": shards[0], "last shard": shards[-1]}.get(file, run.out / file)
    flip(touched, touched.stat().st_size - 1)
    before = digests(run.out)
    with pytest.raises(UsageError, match=r"not what the run .* wrote"):
        convert(run)
    assert digests(run.out) == before
    assert (partial_of(run.out) / "journal.jsonl").exists()
    shutil.rmtree(run.out)
    resumed(run)  # all of it again: what was published is gone


def test_a_published_folder_that_is_what_was_written_is_the_end(renamed):
    """The twin of the test above."""
    resumed(moved(renamed, "untouched"))
