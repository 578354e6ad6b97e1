"""Hessians of the inputs of Linears, as llm-compressor accumulates them: 2 X X^T over the batches.

Linears that are given the same tensor (q, k and v; gate and up) share one.

Shape letters: T tokens, F features in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Hessian:
    """Of one input."""

    def __init__(self, features: int, device: object) -> None:
        import torch
        from llmcompressor.modifiers.gptq.helpers import make_empty_hessian

        self._like = torch.nn.Linear(features, 1, bias=False, device="meta")
        self._sum_FF = make_empty_hessian(self._like, device=torch.device(str(device)))
        self._batches = torch.zeros((), device=self._sum_FF.device)
        self.tokens = 0

    def add(self, x_TF: Tensor) -> None:
        """The tokens of one batch."""
        from llmcompressor.modifiers.gptq.helpers import accumulate_hessian

        accumulate_hessian(x_TF, self._like, self._sum_FF, self._batches)
        self.tokens += len(x_TF)

    def mean(self) -> Tensor:
        """[F, F] in float32, over the batches, in new memory."""
        return self._sum_FF / self._batches


@dataclass(frozen=True)
class _Seen:
    """The input that came last; held, so that no other tensor gets its place in memory."""

    x_TF: Tensor
    version: int
    hessian: Hessian

    def is_again(self, x_TF: Tensor) -> bool:
        mine = self.x_TF
        same = x_TF.data_ptr() == mine.data_ptr() and x_TF.shape == mine.shape
        return same and x_TF.stride() == mine.stride() and mine._version == self.version


class Hessians:
    """Those of the Linears of one layer."""

    def __init__(self) -> None:
        self._of: dict[str, Hessian] = {}
        self._last: _Seen | None = None

    def add(self, linears: Sequence[str], x_TF: Tensor) -> None:
        """Tokens of a batch that are the input of all these Linears."""
        for linear in linears if len(x_TF) else ():
            self._add(linear, x_TF)

    def _add(self, linear: str, x_TF: Tensor) -> None:
        last = self._last if self._last is not None and self._last.is_again(x_TF) else None
        hessian = self._of.get(linear)
        if hessian is None:
            hessian = last.hessian if last else Hessian(x_TF.shape[1], x_TF.device)
            self._of[linear] = hessian
        if last is not None and last.hessian is hessian:
            return
        assert last is not None or not self._is_second(linear), f"{linear} has another input now"
        hessian.add(x_TF)
        self._last = _Seen(x_TF, x_TF._version, hessian)

    def _is_second(self, linear: str) -> bool:
        """Whether it shares the Hessian of one that comes before it."""
        return next(n for n, h in self._of.items() if h is self._of[linear]) != linear

    def take(self, linear: str) -> Hessian | None:
        """The Hessian, and its memory once all who share it have taken it; None without tokens."""
        self._last = None
        return self._of.pop(linear, None)

    def put(self, linear: str, hessian: Hessian) -> None:
        self._of[linear] = hessian
