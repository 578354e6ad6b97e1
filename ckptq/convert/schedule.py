"""Scheduling: how many tasks run at once, when a unit is finished, and when it is on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from ckptq.checkpoint.journal import Journal
from ckptq.checkpoint.read import Files
from ckptq.checkpoint.write import Shards
from ckptq.plan.unit import Unit

Task = Callable[[], None]

Work = Iterator[Sequence[Task]]
"""A unit's work, step by step. Tasks of one step may run at once, on any thread; the next step is
asked for when all of them are done."""


class UnderWay:
    """A unit on its way."""

    def __init__(self, work: Work, then: Callable[[], None]) -> None:
        self.work = work
        self.then = then
        self.left = 0
        """Tasks of the present step that are not done."""


class Schedule:
    """Runs the work of several units on threads at once.

    Steps are asked for, and `then` is called, on the thread that calls `add` and `drain`; so are
    the errors of tasks raised there.
    """

    def __init__(self, pool: ThreadPoolExecutor, max_tasks: int) -> None:
        self._pool = pool
        self._max_tasks = max_tasks
        self._jobs: set[UnderWay] = set()
        self._done: SimpleQueue[tuple[UnderWay, Future[None]]] = SimpleQueue()

    def add(self, work: Work, then: Callable[[], None]) -> None:
        """Begin a unit's work once enough earlier tasks are done; `then` is called at its end."""
        self.wait_while(lambda: sum(job.left for job in self._jobs) >= self._max_tasks)
        job = UnderWay(work, then)
        self._jobs.add(job)
        self._advance(job)

    def drain(self) -> None:
        """Wait until nothing is under way."""
        self.wait_while(lambda: True)

    def wait_while(self, condition: Callable[[], bool]) -> None:
        """Process work while the condition holds and work remains."""
        while self._jobs and condition():
            job, future = self._done.get()
            future.result()
            job.left -= 1
            if not job.left:
                self._advance(job)

    def _advance(self, job: UnderWay) -> None:
        tasks = next((step for step in job.work if step), None)
        if tasks is None:
            self._jobs.remove(job)
            job.then()
            return
        job.left = len(tasks)
        for task in tasks:
            future = self._pool.submit(task)
            future.add_done_callback(lambda done: self._done.put((job, done)))


class Committer:
    """Journals finished units in the background, once their bytes are on disk."""

    def __init__(
        self,
        journal: Journal,
        shards: Shards,
        shard_of: dict[str, str],
        files: Files,
        commit_bytes: int,
        recorded: Callable[[Iterable[str]], None],
    ) -> None:
        self._journal, self._shards, self._shard_of = journal, shards, shard_of
        self._files = files
        self._commit_bytes = commit_bytes
        self._recorded = recorded
        self._thread = ThreadPoolExecutor(1, "ckptq-commit")
        self._under_way: Future[None] | None = None
        self._waiting: list[Unit] = []
        self._waiting_bytes = 0

    def finished(self, unit: Unit) -> None:
        """Note that all bytes of this unit are written; commit from time to time."""
        self._shards.check_complete(unit.writes)
        self._waiting.append(unit)
        self._waiting_bytes += max(unit.read_bytes, unit.write_bytes)
        busy = self._under_way is not None and not self._under_way.done()
        if not busy and self._waiting_bytes >= self._commit_bytes:
            self._commit()

    def flush(self) -> None:
        """Journal all finished units, and wait."""
        self._commit()
        if self._under_way is not None:
            self._under_way.result()

    def close(self) -> None:
        self._thread.shutdown()

    def _commit(self) -> None:
        if self._under_way is not None:
            self._under_way.result()
        units, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if units:
            self._under_way = self._thread.submit(self._make_last, units)

    def _make_last(self, units: list[Unit]) -> None:
        self._files.check_unchanged()
        self._shards.sync(dict.fromkeys(self._shard_of[unit.key] for unit in units))
        self._journal.record({unit.key: self._shards.pieces(unit.writes) for unit in units})
        self._recorded(unit.key for unit in units)


class Filled:
    """Tells of each shard once the last of its units is on disk."""

    def __init__(self, shard_of: Mapping[str, str], then: Callable[[str], None]) -> None:
        self._shard_of, self._then = shard_of, then
        self._left = Counter(shard_of.values())

    def __call__(self, keys: Iterable[str]) -> None:
        """These units are, each named once."""
        for key in keys:
            shard = self._shard_of[key]
            self._left[shard] -= 1
            if not self._left[shard]:
                self._then(shard)
