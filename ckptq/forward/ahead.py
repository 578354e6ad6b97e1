"""Weights of the next layer on their way to a GPU while this one computes.

They are read by several threads into pinned memory and copied on a stream of their own; the
device, not the host, waits for the copy.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ckptq.forward.source import WeightSource

SHARE_OF_FREE = 0.5
"""The share of a GPU's free memory that reading ahead may take."""


@dataclass(frozen=True)
class Arriving:
    """Tensors on the device, complete once `event` has happened there."""

    tensors: dict[str, Tensor]
    event: torch.cuda.Event


class Ahead:
    """Reads sets of tensors before they are needed, in the order in which they are announced."""

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        import torch

        self._source, self._device = source, device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, "ckptq-ahead")
        self._under_way: dict[frozenset[str], Future[Arriving]] = {}

    def begin(self, names: Collection[str]) -> None:
        """Start reading these tensors."""
        key = frozenset(names)
        if key and key not in self._under_way:
            self._under_way[key] = self._thread.submit(self._bring, key)

    def take(self, names: Collection[str]) -> dict[str, Tensor]:
        """The tensors on the device: announced before, or read now."""
        import torch

        begun = self._under_way.pop(frozenset(names), None)
        arriving = begun.result() if begun is not None else self._bring(names)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arriving.event)
        for tensor in arriving.tensors.values():
            tensor.record_stream(current)
        return arriving.tensors

    def room_for(self, nbytes: int) -> bool:
        """Whether this much can be read ahead beside the layer that computes."""
        import torch

        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        return nbytes < SHARE_OF_FREE * (free + unused)

    def _bring(self, names: Collection[str]) -> Arriving:
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            read = self._source.load(sorted(names))
            moved = {n: t.to(self._device, non_blocking=True) for n, t in read.items()}
            event = torch.cuda.Event()
            event.record(self._stream)
        return Arriving(moved, event)
