"""Many small kernels on a GPU as one launch: the host takes longer to start them than they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Graph:
    """Work on tensors of the shapes, dtypes and device that it is first called with."""

    def __init__(self, work: Callable[..., Tensor]) -> None:
        self._work = work
        self._given: list[Tensor] = []

    def __call__(self, *given: Tensor) -> Tensor:
        """What the work makes of these. The next call overwrites it."""
        if not self._given:
            self._record(given)
        for mine, each in zip(self._given, given, strict=True):
            mine.copy_(each)
        self._graph.replay()
        return self._made

    def _record(self, given: tuple[Tensor, ...]) -> None:
        import torch

        self._given = [each.clone() for each in given]
        with torch.cuda.device(given[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._work(*self._given)  # a first time outside, for what is set up only once
                torch.cuda.synchronize()
                self._graph = torch.cuda.CUDAGraph()
                self._graph.capture_begin(capture_error_mode="thread_local")
                self._made = self._work(*self._given)
                self._graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
