"""Where kernel tests run, and memory in which nothing is zero by luck."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is never zero by luck: floats start as NaN, bytes as 0xA5, integers negative."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: object, **kwargs: object) -> torch.Tensor:
            fresh = make(*args, **kwargs)
            if fresh.dtype.is_floating_point and fresh.dtype.itemsize == 1:
                fresh.view(torch.uint8).fill_(0xA5)
                return fresh
            if fresh.is_floating_point():
                return fresh.fill_(float("nan"))
            if fresh.dtype == torch.bool:
                return fresh.fill_(True)
            return fresh.fill_(0xA5 if fresh.dtype == torch.uint8 else -0x5A)

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
