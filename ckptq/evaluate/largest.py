"""The largest values seen so far, by what they belong to; ranks that see other batches compare
theirs."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ckptq.distributed.ranks import Ranks


class Largest:
    """Elementwise maxima by key, where they are computed: reading one makes the host wait."""

    def __init__(self) -> None:
        self.values: dict[Hashable, Tensor] = {}
        self._fresh: dict[Hashable, None] = {}

    def see(self, key: Hashable, amax: Tensor) -> None:
        seen = self.values.get(key)
        self.values[key] = amax if seen is None else torch.maximum(seen, amax)
        self._fresh[key] = None

    def compare(self, ranks: Ranks, device: torch.device) -> None:
        """Take in what other ranks have seen since the last time; all do so at the same point."""
        if ranks.world > 1:
            mine = {key: self.values[key].cpu() for key in self._fresh}
            for seen in ranks.gathered(mine):
                for key, amax in seen.items():
                    self.see(key, amax.to(device))
        self._fresh.clear()
