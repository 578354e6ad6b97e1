"""Whether kernels compute, what CUDA allows of a launch, and what a GPU has.

Imports no triton before a kernel runs.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

MOST_HEADS = 65535
"""Of all sequences of a launch together: CUDA takes no more programs along that axis."""


def on_gpu(where: Tensor | torch.device) -> bool:
    """Whether kernels compute there; where not, torch's own operations do what a CPU does.

    CKPTQ_EAGER=1 takes those on a GPU as well, to find out whether a wrong result is a kernel's
    fault.
    """
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cuda" and os.environ.get("CKPTQ_EAGER") != "1"


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have, by which tiles are cut; on a CPU as many as on an A100."""
    return _shared_memory(device.index or 0) if device.type == "cuda" else 163 << 10


@cache
def _shared_memory(index: int) -> int:
    """Cached, as the driver takes a millisecond to say."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def multiprocessors(device: torch.device) -> int:
    """How many there are to fill; on a CPU as many as on an A100."""
    if device.type != "cuda":
        return 108
    return torch.cuda.get_device_properties(device).multi_processor_count
