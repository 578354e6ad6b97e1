"""Which tensors the kernels take, and what CUDA allows of a launch. Imports no triton."""

import os
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import ParamSpec, TypeVar

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
