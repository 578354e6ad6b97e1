"""Which shard a unit's tensors end in."""

from __future__ import annotations

from collections.abc import Sequence

from ckptq.plan.unit import Unit

SHARD_BYTES = 5_000_000_000
"""Default size of an output shard, as in huggingface_hub."""


def fill_shards(units: Sequence[Unit], shard_bytes: int) -> dict[str, tuple[Unit, ...]]:
    """Next fit, in order. A unit is never split, so a large one gets a shard to itself.

    Example: units of 6, 6, 2, 6 GB with 10 GB shards land in shards 1, 2, 2, 3.
    """
    runs: list[list[Unit]] = [[]]
    room = shard_bytes
    for unit in units:
        nbytes = sum(spec.nbytes for spec in unit.writes.values())
        if runs[-1] and nbytes > room:
            runs.append([])
            room = shard_bytes
        runs[-1].append(unit)
        room -= nbytes
    if len(runs) == 1:
        return {"model.safetensors": tuple(runs[0])}
    return {
        f"model-{number:05d}-of-{len(runs):05d}.safetensors": tuple(run)
        for number, run in enumerate(runs, 1)
    }
