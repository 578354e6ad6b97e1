"""What a GPU has: shared memory, by which tiles are cut, and multiprocessors to fill."""

from functools import cache

import torch
import triton


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; on a CPU as many as on an A100."""
    return _of_gpu(device.index or 0) if device.type == "cuda" else 163 << 10


@cache
def _of_gpu(index: int) -> int:
    """Cached, as the driver takes a millisecond to say."""
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])


def multiprocessors(device: torch.device) -> int:
    """How many there are; on a CPU as many as on an A100."""
    if device.type != "cuda":
        return 108
    return torch.cuda.get_device_properties(device).multi_processor_count
