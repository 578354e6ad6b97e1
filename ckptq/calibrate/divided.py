"""A calibration divided among ranks: each runs its share of the batches, and what they have seen is
merged. Order-independent statistics give the same bits as a single process."""

from __future__ import annotations

from collections.abc import Iterable

from ckptq.calibrate.statistics import Statistics
from ckptq.distributed.ranks import Ranks
from ckptq.errors import UsageError

IN_ORDER = ("minmax",)
"""Observers whose result depends on the order of the batches."""


def check_observers(observers: Iterable[str], ranks: Ranks) -> None:
    """UsageError for an observer whose statistics cannot be divided and merged."""
    for name in observers:
        if ranks.world > 1 and name in IN_ORDER:
            raise UsageError(
                f"observer {name!r} depends on the order of batches, which {ranks.world} "
                "processes do not keep; use 'static_minmax' or a single process"
            )


def merged(statistics: Statistics, ranks: Ranks) -> Statistics:
    """What all ranks have seen."""
    if ranks.world == 1:
        return statistics
    mine = {p: {k: t.cpu() for k, t in stats.items()} for p, stats in statistics.points.items()}
    whole = Statistics(statistics.wanted)
    for points in ranks.gathered(mine):
        whole.add(points)
    return whole
