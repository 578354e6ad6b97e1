"""Moments of the inputs of Linears, as llm-compressor accumulates them, without tokens that would
outweigh all others: the Hessian 2 X X^T for GPTQ, and each feature's sum of squares for iMatrix.

Linears that are given the same tensor (q, k and v; gate and up) share theirs.

Shape letters: T tokens, F features in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.gptq.massive import ordinary

if TYPE_CHECKING:
    from torch import Tensor


class Moments:
    """Of one input."""

    def __init__(self, features: int, device: object, pairs: bool = True) -> None:
        """`pairs` gathers the Hessian too."""
        import torch
        from llmcompressor.modifiers.gptq.helpers import make_empty_hessian

        place = torch.device(str(device))
        self._like = torch.nn.Linear(features, 1, bias=False, device="meta")
        self._sum_FF = make_empty_hessian(self._like, device=place) if pairs else None
        self._batches = torch.zeros((), device=place)
        self.squares_F = torch.zeros(features, device=place)
        """The sum over the tokens of x ** 2."""
        self.tokens = 0
        self.left_out = 0
        """Massive tokens, which are not in it."""

    def add(self, x_TF: Tensor) -> None:
        """The tokens of one batch."""
        from llmcompressor.modifiers.gptq.helpers import accumulate_hessian

        kept_TF = ordinary(x_TF)
        if self._sum_FF is not None:
            accumulate_hessian(kept_TF, self._like, self._sum_FF, self._batches)
        self.squares_F.add_(kept_TF.float().pow(2).sum(0))
        self.tokens += len(kept_TF)
        self.left_out += len(x_TF) - len(kept_TF)

    def hessian(self) -> Tensor:
        """[F, F] in float32, the mean over the batches, in new memory."""
        assert self._sum_FF is not None
        return self._sum_FF / self._batches


@dataclass(frozen=True)
class _Seen:
    """The input that came last; held, so that no other tensor gets its place in memory."""

    x_TF: Tensor
    version: int
    moments: Moments

    def is_again(self, x_TF: Tensor) -> bool:
        mine = self.x_TF
        same = x_TF.data_ptr() == mine.data_ptr() and x_TF.shape == mine.shape
        return same and x_TF.stride() == mine.stride() and mine._version == self.version


class Seen:
    """The moments of the Linears of one layer."""

    def __init__(self, pairs: bool = True) -> None:
        self.pairs = pairs
        self._of: dict[str, Moments] = {}
        self._last: _Seen | None = None

    def add(self, linears: Sequence[str], x_TF: Tensor) -> None:
        """Tokens of a batch that are the input of all these Linears."""
        for linear in linears if len(x_TF) else ():
            self._add(linear, x_TF)

    def _add(self, linear: str, x_TF: Tensor) -> None:
        last = self._last if self._last is not None and self._last.is_again(x_TF) else None
        moments = self._of.get(linear)
        if moments is None:
            moments = last.moments if last else Moments(x_TF.shape[1], x_TF.device, self.pairs)
            self._of[linear] = moments
        if last is not None and last.moments is moments:
            return
        assert last is not None or not self._is_second(linear), f"{linear} has another input now"
        moments.add(x_TF)
        self._last = _Seen(x_TF, x_TF._version, moments)

    def _is_second(self, linear: str) -> bool:
        """Whether it shares the moments of one that comes before it."""
        return next(n for n, m in self._of.items() if m is self._of[linear]) != linear

    def take(self, linear: str) -> Moments | None:
        """The moments, and their memory once all who share them have; None without tokens."""
        self._last = None
        return self._of.pop(linear, None)

    def put(self, linear: str, moments: Moments) -> None:
        self._of[linear] = moments
