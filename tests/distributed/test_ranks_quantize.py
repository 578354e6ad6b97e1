"""A conversion among ranks of which one is killed: any number of processes goes on from there."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny.torchrun import torchrun

from ckptq.checkpoint.partial import partial_of
from ckptq.convert.division.among_ranks import share
from ckptq.convert.quantize import quantize
from ckptq.distributed.ranks import Ranks
from ckptq.distributed.records import RANKS, read_records
from ckptq.forward.layerwise import LayerwiseModel
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme

DYING = """
import os, signal, sys
from ckptq.__main__ import main
from ckptq.checkpoint.journal import Journal
from ckptq.convert import output
output.COMMIT_BYTES = 1
record = Journal.record
def dying(self, done):
    record(self, done)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
Journal.record = dying
main()
"""


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def lost(given, tmp_path_factory) -> Path:
    """What two ranks leave when one of them is killed after its first unit."""
    folder = tmp_path_factory.mktemp("lost")
    (folder / "dying.py").write_text(DYING)
    words = ["quantize", given.llama, "-o", folder / "out", "--scheme", "fp8-per-head"]
    words += ["--data", given.text, "--batch-size", "2", "--shard-size", "10KB", "--device", "cpu"]
    ended = torchrun(2, folder / "dying.py", *words)
    assert ended.returncode != 0
    assert "rerun the same command to resume" in ended.stderr
    assert "/ckptq/" not in ended.stderr, "a traceback of ours"
    assert not (folder / "out").exists()
    return folder


@pytest.fixture
def left(lost, tmp_path) -> Path:
    """A copy of it; the output that it is to become."""
    shutil.copytree(lost / "out.partial", tmp_path / "out.partial")
    return tmp_path / "out"


def test_one_process_goes_on_where_ranks_were_lost(given, whole, left, monkeypatch):
    """Also with the calibration, which was finished."""
    monkeypatch.setattr(LayerwiseModel, "run_layer", lambda *_, **__: pytest.fail("ran again"))
    done = quantize(given.request(left))
    assert done.resumed_units > 0
    assert files(left) == files(whole)
    assert not partial_of(left).exists()


def test_what_the_killed_rank_had_done_counts(given, left):
    record = partial_of(left) / RANKS / "1.jsonl"
    done = len(read_records(record).done)
    assert done > 0
    every = {file.name: len(read_records(file).done) for file in record.parent.iterdir()}
    mine = len(read_records(partial_of(left) / "journal.jsonl").done)
    record.unlink()
    resumed = quantize(given.request(left)).resumed_units
    assert resumed == mine + sum(every.values()) - done


def test_what_a_rank_says_is_proved(given, whole, left):
    """Units that are not as they were written are made again, and counted in a note."""
    for shard in (partial_of(left) / "checkpoint").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-8:] = b"damaged!"
        shard.write_bytes(data)
    told: list[str] = []
    quantize(given.request(left), note=told.append)
    assert any("differ from what was written" in line for line in told), told
    assert files(left) == files(whole)


def test_shards_are_divided_by_what_is_left(given):
    from ckptq.checkpoint.open import open_checkpoint

    plan = make_plan(open_checkpoint(given.llama), load_scheme("fp8-dynamic"), shard_bytes=10_000)
    keys = {unit.key for units in plan.shards.values() for unit in units}
    for done in ((), keys):
        shares = [share(plan.shards, done, Ranks(rank, 3)) for rank in range(3)]
        assert sorted(shard for each in shares for shard in each) == sorted(plan.shards)
        counts = [len(each) for each in shares]
        nbytes = [sum(u.read_bytes for us in each.values() for u in us) for each in shares]
        assert max(counts) - min(counts) <= 1 or max(nbytes) < 1.5 * min(nbytes)
    assert share(plan.shards, (), replace(Ranks(), world=1)) == plan.shards
