"""What the Linears of one layer are given while it runs: moments of their inputs.

Inputs of fused experts are made afterwards, a few experts at a time (`ckptq.gptq.routed`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ckptq.forward.layerwise import LayerwiseModel
from ckptq.forward.linear_inputs import Experts, Inputs
from ckptq.gptq.moments import Seen
from ckptq.gptq.routed import Routed
from ckptq.text.samples import Batch

if TYPE_CHECKING:
    from torch import nn


class Gathered:
    """Of the layer at hand."""

    def __init__(self, pairs: bool = True) -> None:
        """`pairs` gathers Hessians too."""
        self.seen = Seen(pairs)
        self._routed: dict[str, Routed] = {}

    def watched(
        self,
        model: LayerwiseModel,
        name: str,
        layer: nn.Module,
        batch: Batch,
        linears: Collection[str],
    ) -> AbstractContextManager[None]:
        """Gathers, while the layer runs on a batch, what these Linears are given."""

        def route(experts: Experts, module: nn.Module, args: tuple[Any, ...]) -> None:
            routed = self._routed.setdefault(_first(experts), Routed(module, experts))
            routed.see(args, batch.lengths)

        inputs = Inputs(model.loader, linears)
        return inputs.watched(layer, name, batch.lengths, self.seen.add, route)

    def in_turn(self, linears: Collection[str]) -> Iterator[set[str]]:
        """These Linears, with their moments in `seen`: those of experts in portions."""
        routed = {name for each in self._routed.values() for name in each.linears}
        yield set(linears) - routed
        for each in self._routed.values():
            for portion in each.portions():
                for number in portion:
                    for linear, moments in each.moments(number, self.seen.pairs):
                        self.seen.put(linear, moments)
                yield {name for number in portion for name in each.experts[number]}

    def tokens(self) -> dict[str, dict[int, int]]:
        """The first Linear of each module of fused experts -> expert -> how many tokens it got."""
        return {first: each.tokens() for first, each in self._routed.items()}


def _first(experts: Experts) -> str:
    """What tells modules of experts apart: the first of their Linears."""
    return next(name for names in experts.values() for name in names)
