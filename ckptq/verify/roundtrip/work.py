"""Many small tasks on a few threads, results in order, never more in flight than memory allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ckptq.distributed.ranks import cores

T = TypeVar("T")


def in_order(tasks: Iterable[Callable[[], T]], workers: int | None = None) -> Iterator[T]:
    """The results of the tasks, in their order; tasks are taken only as results are fetched.

    Each worker computes on its own; torch's threads would only compete.
    """
    import torch

    count = workers or cores()
    pool = ThreadPoolExecutor(
        count, "ckptq-verify", initializer=torch.set_num_threads, initargs=(1,)
    )
    running: deque[Future[T]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(task))
            if len(running) >= 4 * count:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
