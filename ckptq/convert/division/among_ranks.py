"""A conversion divided among the ranks that torchrun starts: each fills shards of its own, in the
folder of an ordinary run, which any number of processes can resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ckptq.checkpoint.identity import difference
from ckptq.checkpoint.journal import Journal
from ckptq.distributed.ranks import Ranks
from ckptq.errors import UsageError
from ckptq.plan.unit import Unit


def opened(
    open_first: Callable[[], Journal], out: Path, depends: Mapping[str, Any], ranks: Ranks
) -> Journal:
    """The journal that the first rank opens, and those of the others beside it.

    UsageError where ranks do not convert the same: another host may have another source.
    """
    if ranks.world == 1:
        return open_first()
    mine = json.loads(json.dumps(depends))
    wanted = ranks.from_first(mine)
    ranks.agreed(lambda: _check_same(wanted, mine, ranks))
    first = ranks.agreed(lambda: open_first() if ranks.leads else None)
    with first.gone_unless_kept() if first is not None else nullcontext():
        said = ranks.led(lambda: first.let_others_in() if first is not None else None)
        assert said is not None
        return ranks.agreed(lambda: first or Journal.beside(out, ranks.rank, *said))


def _check_same(wanted: Mapping[str, Any], mine: Mapping[str, Any], ranks: Ranks) -> None:
    if mine != wanted:
        found = difference(wanted, mine)
        raise UsageError(f"rank {ranks.rank} does not convert what rank 0 does: {found}")


def share(
    shards: Mapping[str, tuple[Unit, ...]], done: Collection[str], ranks: Ranks
) -> dict[str, tuple[Unit, ...]]:
    """The shards of this rank: the largest first, each to the rank with the least to do so far.

    What is `done` only has to be proved, and counts as nothing.
    """
    if ranks.world == 1:
        return dict(shards)
    left = {
        shard: sum(unit.read_bytes for unit in units if unit.key not in done)
        for shard, units in shards.items()
    }
    tasks = [(0, 0)] * ranks.world
    """(bytes, shards) of each rank."""
    mine = set()
    for shard in sorted(shards, key=lambda shard: -left[shard]):
        rank = tasks.index(min(tasks))
        tasks[rank] = (tasks[rank][0] + left[shard], tasks[rank][1] + 1)
        if rank == ranks.rank:
            mine.add(shard)
    return {shard: units for shard, units in shards.items() if shard in mine}
