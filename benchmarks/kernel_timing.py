"""Time kernels on a device, and what a device copy reaches there; shared by the kernel benchmarks.

Times are medians of single runs between two events, each after a fill that is larger than the L2
cache: nothing is found there by luck. The device sleeps first, until the host has launched all
runs: what is measured is the device's time, not the host's.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 512 << 20
SLEEP = 400_000_000
"""Cycles of the device: a fifth of a second."""


def measure(run: Callable[[], Any], runs: int = 30) -> float:
    """Median milliseconds of `run` on the GPU, or on the host's clock where there is none."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [(_event(), _event()) for _ in range(runs)]
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)  # torch has no public way to hold a stream back
    for before, after in events:
        flush.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def copy_gbs(nbytes: int, device: torch.device) -> float:
    """GB/s of a device copy of `nbytes`, read and written bytes counted."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * nbytes / measure(lambda: target.copy_(source)) / 1e6


def nbytes_of(tensors: Any) -> int:
    """Bytes of all tensors in a tensor or a tuple."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, tuple | list):
        return sum(nbytes_of(tensor) for tensor in tensors)
    return 0
