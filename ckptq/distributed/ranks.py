"""The processes that torchrun starts for one task, on a host or on several.

Every process, a rank, does its share of the work. What they tell each other is small: statistics,
findings, sums. Results have the order of the ranks, or of the work, never
that of arrival. On several hosts they share a file system, where outputs are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import TypeVar

from ckptq.distributed.group import Group
from ckptq.errors import CkptqError, ToldElsewhere
from ckptq.interrupts import ignore_signals

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among several. All ranks call the same methods in the same order; with a single
    process each does nothing."""

    rank: int = 0
    world: int = 1
    on_host: int = 1
    """How many of them are on this machine."""
    group: Group | None = field(default=None, repr=False, compare=False)
    """None for a single process, and outside of `together`."""

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> list[T]:
        """Those of this rank: every `world`-th."""
        return list(items)[self.rank :: self.world]

    def gathered(self, mine: T) -> list[T]:
        """What every rank has, in their order. Tensors have to be on the CPU."""
        return [mine] if self.group is None else self.group.gather(mine)

    def joined(self, mine: Sequence[T]) -> list[T]:
        """All ranks' results for their `share`, in the order of the whole."""
        shares = self.gathered(list(mine))
        whole: list[T] = [shares[0][0]] * sum(map(len, shares)) if any(shares) else []
        for rank, each in enumerate(shares):
            whole[rank :: self.world] = each
        return whole

    def from_first(self, mine: T) -> T:
        """What rank 0 has."""
        if self.group is None:
            return mine
        found: T = self.group.broadcast(mine, self.leads)
        return found

    def agreed(self, step: Callable[[], T]) -> T:
        """Take a step that may fail. If it fails on any rank, the first of these raises its error,
        and the others `ToldElsewhere`."""
        if self.world == 1:
            return step()
        result: list[T] = []
        error = None
        try:
            result.append(step())
        except CkptqError as found:
            error = found
        codes = self.gathered(error.exit_code if error is not None else None)
        first = next((rank for rank, code in enumerate(codes) if code is not None), None)
        if first is None:
            return result[0]
        if error is not None and first == self.rank:
            ignore_signals()  # torchrun ends this process as soon as another has ended
            raise error
        raise ToldElsewhere(codes[first] or 1) from error

    def led(self, step: Callable[[], T]) -> T:
        """What a step gives that rank 0 alone takes."""
        if self.world == 1:
            return step()
        made = self.agreed(lambda: step() if self.leads else None)
        return self.from_first(made)  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait for all ranks."""
        self.gathered(None)


ALONE = Ranks()

_MET = Event()


def started() -> Ranks:
    """What torchrun says of this process in its environment."""
    said = os.environ
    world, on_host = int(said.get("WORLD_SIZE", "1")), int(said.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(int(said.get("RANK", "0")), world, on_host)


def cores() -> int:
    """The cores of this process: its part of the machine's, where ranks share it."""
    return max(1, len(os.sched_getaffinity(0)) // started().on_host)


@contextmanager
def together() -> Iterator[Ranks]:
    """Let the processes started by torchrun communicate inside the block."""
    ranks = started()
    if ranks.world == 1:
        yield ranks
        return
    import torch

    if not _threads_chosen():
        torch.set_num_threads(cores())
    group = Group(ranks.rank, ranks.world)
    _MET.set()
    try:
        yield replace(ranks, group=group)
    finally:
        group.close()


def met() -> bool:
    """Whether the ranks have communicated. Until then they all do the same, and find the same
    mistakes in a command line."""
    return _MET.is_set()


def _threads_chosen() -> bool:
    """Whether the user has set OMP_NUM_THREADS. Where nobody has, torchrun sets it to 1; the
    environment that torchrun itself was started with tells the two apart."""
    try:
        held = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return os.environ.get("OMP_NUM_THREADS") != "1"
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in held.split(b"\0"))
