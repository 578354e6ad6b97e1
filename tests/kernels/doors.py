"""The doors to the kernels: the public functions of every `dispatch.py`, and their two sides."""

from collections.abc import Callable
from typing import Any

import pytest

from ckptq.kernels.cache import dispatch as cache
from ckptq.kernels.int4 import dispatch as int4
from ckptq.kernels.linear import dispatch as linear
from ckptq.kernels.quantize import dispatch as quantize
from ckptq.kernels.token_head import dispatch as token_head

WEIGHTS = (quantize, int4, linear)
CACHES = (cache, token_head)


def doors(modules: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    return {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if hasattr(function, "__wrapped__")
    }


def take(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    """Take the kernel's side of every door, or the other; without a GPU the former interprets."""
    monkeypatch.setattr("ckptq.kernels.gpu.on_gpu", lambda _x: gpu)
