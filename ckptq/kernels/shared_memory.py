"""How much shared memory a program may have: what tiles are cut by."""

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
