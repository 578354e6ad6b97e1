"""Which tensors the kernels take, what CUDA allows of a launch, and what a GPU has.

Imports no triton before a kernel runs.
"""

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

MOST_HEADS = 65535
"""Of all sequences of a launch together: CUDA takes no more programs along that axis."""

P = ParamSpec("P")
R = TypeVar("R")


def on_gpu(x: Tensor) -> bool:
    """Whether a kernel takes x; where not, the reference beside it does.

    CKPTQ_EAGER=1 takes the reference on a GPU as well, to find out whether a wrong result is a
    kernel's fault.
    """
    return x.is_cuda and os.environ.get("CKPTQ_EAGER") != "1"


def door(kernel: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function in plain torch: where `on_gpu` says so of its first argument, call `kernel`.

    `kernel` is "module:function", of the same arguments. The first call that needs it imports it,
    and triton.
    """
    module, _, name = kernel.partition(":")

    def decorate(meaning: Callable[P, R]) -> Callable[P, R]:
        @wraps(meaning)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            assert isinstance(args[0], Tensor)
            if not on_gpu(args[0]):
                return meaning(*args, **kwargs)
            fast: Callable[P, R] = getattr(import_module(module), name)
            return fast(*args, **kwargs)

        return call

    return decorate


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
