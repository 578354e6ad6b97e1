"""Stored tensors in memory on the device that computes, each read from disk once.

On a GPU they are read by several threads into pinned memory and copied on a stream of their own:
the device, not the host, waits for a copy, and the next layer can be on its way while this one
computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, bytes_of, read_into, read_tensor
from ckptq.spec import torch_dtype

if TYPE_CHECKING:
    from pathlib import Path


READERS = 4
"""Threads that read for a GPU; one alone is slower than the GPU computes."""

READ_BYTES = 1 << 24

SHARE_OF_FREE = 0.5
"""The share of a GPU's free memory that reading ahead may take."""

Key = tuple["Path", str]


class Reader:
    """Gives stored tensors on a device.

    With `keep`, for several sources that are made of the same tensors, what was taken stays in
    memory until `release`; without, whoever takes a tensor holds it alone.
    """

    def __init__(self, device: torch.device | str = "cpu", *, keep: bool = False) -> None:
        self.device = torch.device(device)
        self._keep = keep
        self._kept: dict[Key, Tensor] = {}
        self._ahead = _Ahead(self.device) if self.device.type == "cuda" else None

    def take(self, stored: StoredTensor) -> Tensor:
        """The whole tensor. With `keep` it is others' too, and not to be written to."""
        key = _key(stored)
        if key in self._kept:
            return self._kept[key]
        tensor = read_tensor(stored) if self._ahead is None else self._ahead.take(stored)
        if self._keep:
            self._kept[key] = tensor
        return tensor

    def begin(self, wanted: Collection[StoredTensor]) -> None:
        """Start to read what will be taken soon, in this order; on a CPU that is left to `take`."""
        if self._ahead is not None:
            self._ahead.begin([each for each in wanted if _key(each) not in self._kept])

    def begin_early(self, wanted: Collection[StoredTensor]) -> None:
        """As `begin`, if there is room for it beside what computes."""
        if self._ahead is not None and self._ahead.room_for(sum(each.nbytes for each in wanted)):
            self.begin(wanted)

    def release(self) -> None:
        """Drop what was kept; what is on its way stays."""
        self._kept.clear()


def _key(stored: StoredTensor) -> Key:
    return stored.file, stored.name


@dataclass(frozen=True)
class _Arriving:
    """Tensors on the device, complete once `event` has happened there."""

    tensors: dict[Key, Tensor]
    event: torch.cuda.Event


class _Ahead:
    """Brings tensors to a GPU in the order in which they are begun."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, "ckptq-ahead")
        self._readers = ThreadPoolExecutor(READERS, "ckptq-read")
        self._under_way: dict[Key, Future[_Arriving]] = {}

    def begin(self, wanted: Collection[StoredTensor]) -> None:
        fresh = [each for each in wanted if _key(each) not in self._under_way]
        for group in groups(fresh):
            task = self._thread.submit(self._bring, group)
            self._under_way |= {_key(each): task for each in group}

    def take(self, stored: StoredTensor) -> Tensor:
        """The tensor, for the current stream: begun before, or now."""
        self.begin([stored])
        arriving = self._under_way.pop(_key(stored)).result()
        tensor = arriving.tensors.pop(_key(stored))
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arriving.event)
        tensor.record_stream(current)
        return tensor

    def room_for(self, nbytes: int) -> bool:
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        return nbytes < SHARE_OF_FREE * (free + unused)

    def _bring(self, group: Collection[StoredTensor]) -> _Arriving:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            read = self._read(group)
            moved = {key: t.to(self._device, non_blocking=True) for key, t in read.items()}
            event = torch.cuda.Event()
            event.record(self._stream)
        return _Arriving(moved, event)

    def _read(self, group: Collection[StoredTensor]) -> dict[Key, Tensor]:
        """In pinned memory, from which a GPU copies directly."""
        with Files() as files:
            made = {_key(each): _pinned(each) for each in group}
            tasks = [
                self._readers.submit(read_into, files, each, start, part)
                for each in group
                for start, part in _parts(bytes_of(made[_key(each)]))
            ]
            for task in tasks:
                task.result()
        return made


def groups(wanted: Iterable[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """In order, as many at a time as give every thread something to read."""
    group: list[StoredTensor] = []
    for stored in wanted:
        group.append(stored)
        if sum(each.nbytes for each in group) >= READERS * READ_BYTES:
            yield group
            group = []
    if group:
        yield group


def _parts(buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Where each starts, and the memory that one thread fills."""
    for start in range(0, len(buffer), READ_BYTES):
        yield start, buffer[start : start + READ_BYTES]


def _pinned(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.spec.shape, dtype=torch_dtype(stored.spec.dtype), pin_memory=True)
