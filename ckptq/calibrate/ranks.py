"""Calibration in the processes that torchrun starts, one for each GPU.

Every process reads all weights, and runs its share of the batches on its own device. At the end
statistics are merged; order-independent ones give the same bits as a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from ckptq.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ckptq.calibrate.statistics import Statistics
    from ckptq.text.samples import Batch

IN_ORDER = ("minmax",)
"""Observers whose result depends on the order of the batches."""

PATIENCE = timedelta(days=1)
"""How long a process may wait for the slowest."""


@dataclass(frozen=True)
class Ranks:
    """This process among several; with a single process, all methods are no-ops."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def check(self, observers: Iterable[str]) -> None:
        """UsageError for an observer whose statistics cannot be divided and merged."""
        for name in observers:
            if self.world > 1 and name in IN_ORDER:
                raise UsageError(
                    f"observer {name!r} depends on the order of batches, which {self.world} "
                    "processes do not keep; use 'static_minmax' or a single process"
                )

    def share(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches that this process runs."""
        return list(batches)[self.rank :: self.world]

    def merge(self, statistics: Statistics) -> None:
        """Merge the statistics of all processes into each."""
        if self.world == 1:
            return
        import torch.distributed as dist

        mine = {p: {k: t.cpu() for k, t in s.items()} for p, s in statistics.points.items()}
        found: list[Mapping[str, dict[str, torch.Tensor]]] = [{}] * self.world
        dist.all_gather_object(found, mine)
        statistics.points.clear()
        for points in found:
            statistics.add(points)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()


ALONE = Ranks()


def started() -> Ranks:
    """What torchrun says of this process in its environment."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def together() -> Iterator[Ranks]:
    """Let the processes started by torchrun communicate inside the block."""
    ranks = started()
    if ranks.world == 1:
        yield ranks
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
