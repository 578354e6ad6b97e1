"""Where weights are quantized: on the reading threads, or on a GPU. Both give the same bits.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ckptq.checkpoint.read import Memory
from ckptq.convert.blocks import CALL_ELEMENTS, RUN_ELEMENTS
from ckptq.device import find_device
from ckptq.errors import MachineError
from ckptq.models.weight_rows import Place
from ckptq.quantize.dispatch import kernel_of
from ckptq.quantize.formats import WeightScheme, quantize, statistic
from ckptq.quantize.scratch import BLOCK_ELEMENTS, Scratch
from ckptq.quantize.tiles import check_finite

Made = dict[str, Tensor]
"""Stored tensors by local name, on the CPU; lost at the thread's next call."""

LARGEST_BLOCK = 1 << 21
"""Elements. With these 8 threads are 2.5 times as fast as 2, and 16 no faster than 8."""


class OnCores:
    """Each thread computes on its own, in memory that it reuses.

    Between torch calls a thread holds the GIL, so more threads need longer calls: with the block
    size that is best for one thread, 8 threads are slower than 2."""

    def __init__(self, workers: int = 1) -> None:
        self.memory = Memory()
        self.scratch = Scratch(block_elements=min(BLOCK_ELEMENTS * workers, LARGEST_BLOCK))
        self.elements: int | None = None
        """Elements read, quantized and written at a time; None for the default."""
        self.place: Place | None = None
        """Takes what is stored quantized to where it is decoded; None leaves it where it is."""
        if workers * BLOCK_ELEMENTS > CALL_ELEMENTS:
            self.elements = LARGEST_BLOCK

    def turn(self, linear: str) -> AbstractContextManager[object]:
        """In which a thread reads, decodes and quantizes rows of a Linear."""
        return nullcontext()

    def statistic(self, w_RC: Tensor, scheme: WeightScheme) -> Tensor:
        return statistic(w_RC, scheme, self.scratch)

    def quantize(self, w_RC: Tensor, scheme: WeightScheme, shared: Tensor | None) -> Made:
        return quantize(w_RC, scheme, shared, self.scratch)


class OnGpu(OnCores):
    """Each thread has a stream, so that its transfers and arithmetic overlap with the other
    threads' I/O. float64 is computed on the CPU."""

    def __init__(self, device: torch.device, workers: int = 1) -> None:
        super().__init__(workers)
        self.memory = Memory(pinned=True)
        self.elements = RUN_ELEMENTS
        self.place = self._there
        self._device = device
        self._lane = _Lane(device)

    @contextmanager
    def turn(self, linear: str) -> Iterator[None]:
        try:
            with torch.cuda.stream(self._lane.stream):
                yield
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"{self._device}: out of memory for rows of {linear}; use fewer --workers"
            ) from error

    def statistic(self, w_RC: Tensor, scheme: WeightScheme) -> Tensor:
        if w_RC.dtype == torch.float64:
            return super().statistic(w_RC, scheme)
        return statistic(self._there(w_RC), scheme, self._lane.scratch).cpu()

    def quantize(self, w_RC: Tensor, scheme: WeightScheme, shared: Tensor | None) -> Made:
        if w_RC.dtype == torch.float64:
            return super().quantize(w_RC, scheme, shared)
        return self._lane.fetch(self._made(self._there(w_RC), scheme, shared))

    def _there(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=True)

    def _made(self, x_RC: Tensor, scheme: WeightScheme, shared: Tensor | None) -> Made:
        """By a kernel, or in torch's operations where there is none."""
        kernel = kernel_of(scheme)
        if kernel is None:
            at_hand = None if shared is None else shared.to(x_RC.device)
            return quantize(x_RC, scheme, at_hand, self._lane.scratch)
        check_finite(x_RC)
        return kernel(x_RC, scheme, shared)


class _Lane(threading.local):
    """A thread's own stream, memory to compute in, and pinned memory for what comes back."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.scratch = Scratch(device)
        self._pieces: dict[str, Tensor] = {}

    def fetch(self, made: Made) -> Made:
        """The tensors on the CPU, when everything on the stream is done."""
        found = {n: self._pinned(n, t).copy_(t, non_blocking=True) for n, t in made.items()}
        self.stream.synchronize()
        return found

    def _pinned(self, name: str, like: Tensor) -> Tensor:
        held = self._pieces.get(name)
        if held is None or held.numel() < like.nbytes:
            held = self._pieces[name] = torch.empty(like.nbytes, dtype=torch.uint8, pin_memory=True)
        return held[: like.nbytes].view(like.dtype).view(like.shape)


def arithmetic_on(device: str | None, workers: int = 1) -> OnCores:
    """What computes on the device of that name (`find_device`)."""
    found = find_device(device)
    return OnCores(workers) if found.type == "cpu" else OnGpu(found, workers)
