"""What a rank knows without the others."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from ckptq.distributed import ranks
from ckptq.distributed.ranks import Ranks, cores, started
from ckptq.errors import MachineError, SourceError, ToldElsewhere
from ckptq.evaluate.variant import Variant
from ckptq.evaluate.watching import Watching


@pytest.mark.parametrize(("given", "chosen"), [({}, False), ({"OMP_NUM_THREADS": "1"}, True)])
def test_the_threads_that_a_user_has_chosen_are_told_from_torchruns_own(monkeypatch, given, chosen):
    """torchrun hands on its 1 either way; what it was started with is the user's."""
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    script = [sys.executable, "-c", "print(flush=True); input()"]
    launcher = subprocess.Popen(script, stdin=-1, stdout=-1, env=clean | given)
    assert launcher.stdout is not None
    launcher.stdout.readline()  # before it has begun, it has no environment
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
    assert ranks._threads_chosen() is chosen
    launcher.communicate(b"\n")


def test_ranks_of_a_host_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(10))
    assert cores() == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert cores() == 1


def test_torchrun_says_who_this_is(monkeypatch):
    assert started() == Ranks()
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert started() == Ranks(5, 8, 4)
    assert not started().leads


@dataclass
class Canned:
    """A group in which the other rank always says the same."""

    rank: int
    other: Any

    def gather(self, mine: Any) -> list[Any]:
        return [mine, self.other] if self.rank == 0 else [self.other, mine]


def ranks_with(rank: int, other: Any) -> Ranks:
    return Ranks(rank, 2, group=Canned(rank, other))  # type: ignore[arg-type]


def test_shares_are_joined_in_the_order_of_the_whole():
    whole = list("abcdefg")
    shares = [Ranks(rank, 2).share(whole) for rank in range(2)]
    assert shares == [list("aceg"), list("bdf")]
    for rank in range(2):
        assert ranks_with(rank, shares[1 - rank]).joined(shares[rank]) == whole
    assert ranks_with(0, []).joined([]) == []


def test_one_rank_alone_tells_what_went_wrong():
    def wrong():
        raise SourceError("no such tensor")

    assert ranks_with(0, None).agreed(lambda: "done") == "done"
    with pytest.raises(SourceError, match="no such tensor"):
        ranks_with(0, SourceError.exit_code).agreed(wrong)
    for step in (wrong, lambda: "done"):  # rank 0 has the same error, or another
        with pytest.raises(ToldElsewhere) as told:
            ranks_with(1, SourceError.exit_code).agreed(step)
        assert told.value.exit_code == SourceError.exit_code
    with pytest.raises(SourceError):  # this one alone has it
        ranks_with(1, None).agreed(wrong)


def test_a_row_that_fails_on_any_rank_fails_on_all():
    source, other = Variant(name="source"), {"int4": MachineError("no room")}
    for rank in range(2):
        watching = Watching(
            source=source, rows=[source], needed=["source"], consumed={},
            ranks=ranks_with(rank, (other, {"fp8": {"simulated": None}})),
        )  # fmt: skip
        watching.failed["w8a8"] = SourceError("not finite")
        watching.gather()
        assert {row: str(why) for row, why in watching.failed.items()} == {
            "int4": "no room", "w8a8": "not finite",
        }  # fmt: skip
        assert watching.notes == {"fp8": {"simulated": None}}
