"""How much is under way at once, when a unit is finished, and when it is on the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ckptq.checkpoint.journal import Journal
from ckptq.checkpoint.write import Shards
from ckptq.plan.unit import Unit

T = TypeVar("T")

COMMIT_BYTES = 1 << 29
"""How much is written between two entries of the journal."""


@dataclass(frozen=True, slots=True)
class Pending:
    futures: Sequence[Future[None]]
    held: int
    then: Callable[[], None]


class Schedule:
    """Hands the tasks of units to threads, oldest first, within limits on tasks and on held bytes.

    One unit is always let in, however large: it is the plan's business whether it fits the memory.
    """

    def __init__(self, pool: ThreadPoolExecutor, max_tasks: int, max_held: int) -> None:
        self._pool = pool
        self._max_tasks, self._max_held = max_tasks, max_held
        self._pending: deque[Pending] = deque()

    def add(self, tasks: Sequence[Callable[[], None]], held: int, then: Callable[[], None]) -> None:
        """Queue a unit's tasks, which hold `held` bytes; `then` is called here when all are done.

        Raises the error of any task that failed.
        """
        while self._pending and not self._fits(len(tasks), held):
            self._finish_oldest()
        futures = [self._pool.submit(task) for task in tasks]
        self._pending.append(Pending(futures, held, then))

    def gather(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks now and wait for their results, in order."""
        futures = [self._pool.submit(task) for task in tasks]
        return [future.result() for future in futures]

    def drain(self) -> None:
        """Wait until nothing is under way."""
        while self._pending:
            self._finish_oldest()

    def _fits(self, tasks: int, held: int) -> bool:
        under_way = sum(not f.done() for p in self._pending for f in p.futures)
        holding = sum(p.held for p in self._pending)
        return under_way + tasks <= self._max_tasks and holding + held <= self._max_held

    def _finish_oldest(self) -> None:
        oldest = self._pending.popleft()
        for future in oldest.futures:
            future.result()
        oldest.then()


class Committer:
    """Journals finished units, once their bytes are on the disk, beside the work that goes on."""

    def __init__(self, journal: Journal, shards: Shards, shard_of: dict[str, str]) -> None:
        self._journal, self._shards, self._shard_of = journal, shards, shard_of
        self._thread = ThreadPoolExecutor(1, "ckptq-commit")
        self._under_way: Future[None] | None = None
        self._waiting: list[Unit] = []

    def finished(self, unit: Unit) -> None:
        """All bytes of this unit have been written; now and then, make them last."""
        self._shards.check_complete(unit.writes)
        self._waiting.append(unit)
        busy = self._under_way is not None and not self._under_way.done()
        if not busy and sum(u.write_bytes for u in self._waiting) >= COMMIT_BYTES:
            self._commit()

    def flush(self) -> None:
        """Journal everything that is finished, and wait for it."""
        self._commit()
        if self._under_way is not None:
            self._under_way.result()

    def close(self) -> None:
        self._thread.shutdown()

    def _commit(self) -> None:
        if self._under_way is not None:
            self._under_way.result()
        units, self._waiting = self._waiting, []
        if units:
            self._under_way = self._thread.submit(self._make_last, units)

    def _make_last(self, units: list[Unit]) -> None:
        self._shards.sync(dict.fromkeys(self._shard_of[unit.key] for unit in units))
        self._journal.record(unit.key for unit in units)
