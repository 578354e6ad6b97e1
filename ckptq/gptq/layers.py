"""One decoder layer after the other quantized by its inputs, while calibration runs them.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import UsageError
from ckptq.forward.layerwise import LayerwiseModel, Stream
from ckptq.forward.source import WeightSource
from ckptq.gptq.gathered import Gathered
from ckptq.gptq.kept import kept_in
from ckptq.gptq.rewritten import Rewritten
from ckptq.gptq.told import Told
from ckptq.gptq.units import Made, Units
from ckptq.plan.unit import Plan, Unit
from ckptq.text.samples import Batch

if TYPE_CHECKING:
    import torch
    from torch import nn


class LayerQuantizer:
    """Quantizes what a plan quantizes of each decoder layer that is run."""

    def __init__(
        self, plan: Plan, folder: Path, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        """`folder` keeps the finished layers. Of several `ranks` all run the layers on all samples,
        because a Hessian is a sum in their order; they divide the weights.
        """
        self._plan = plan
        self._units = Units(plan, device)
        self._ranks = ranks
        self.kept = kept_in(folder)
        self._weights: Rewritten | None = None
        self._gathered = Gathered(self.again)
        self._of_layer: dict[str, list[Unit]] = {}
        """That of the last layer asked for."""

    def weights(self, source: WeightSource) -> WeightSource:
        """What the model is to read: the source, with the layer at hand as it was quantized."""
        self._weights = Rewritten(source)
        return self._weights

    @property
    def again(self) -> bool:
        """Whether a layer is given what the quantized ones before it make of the samples.

        As in llm-compressor, which rounds weights only when all is over, but has GPTQ's at once.
        """
        return self._plan.recipe.gptq is not None

    def holds(self, layers: range) -> bool:
        """Whether these are finished, and as they were written."""
        return self.kept.holds(layers)

    def holds_all(self) -> bool:
        return self.holds(range(self._plan.layout.num_layers))

    def watched(
        self, model: LayerwiseModel, name: str, layer: nn.Module, batch: Batch
    ) -> AbstractContextManager[None]:
        """Gathers, while the layer runs on a batch, what its Linears are given."""
        names = (_names(unit) for unit in self._units_of(model, name))
        return self._gathered.watched(model, name, layer, batch, set().union(*names))

    def finish(self, model: LayerwiseModel, index: int, stream: Stream) -> None:
        """Quantize a layer that has run on all batches, and keep the result."""
        assert self._weights is not None
        made, told = Made(), Told(experts=self._gathered.tokens())
        units = self._units_of(model, model.layer_names[index])
        for names in self._gathered.in_turn(set().union(*map(_names, units))):
            ready = [unit for unit in units if _names(unit) & names]
            for found, said in self._quantized(ready):
                made |= found
                told.add(said)
        self._ranks.led(lambda: self.kept.keep(index, made, told.to_json()))
        if self.again:
            self._weights.rewrite([part for unit in units for part in unit.parts], made)
        self._gathered = Gathered(self.again)

    def _quantized(self, units: Sequence[Unit]) -> list[tuple[Made, Told]]:
        """What all ranks make of units, in the order of these."""
        mine = []
        for batch in self._ranks.share(self._units.in_batches(units)):
            told = Told()
            mine.append((self._units.quantized(batch, self._gathered.seen, told), told))
        for linear in set().union(*map(_names, units)):
            self._gathered.seen.take(linear)  # which another rank has used
        return self._ranks.joined(mine)

    def _units_of(self, model: LayerwiseModel, name: str) -> list[Unit]:
        """What of a layer is quantized."""
        if name not in self._of_layer:
            prefix = model.loader.stored_module(name) + "."
            quantized = (unit for unit in self._plan.units if unit.parts)
            held = [unit for unit in quantized if unit.parts[0].linear.name.startswith(prefix)]
            self._of_layer = {name: held}
        return self._of_layer[name]


def _names(unit: Unit) -> set[str]:
    return {part.linear.name for part in unit.parts}


def check_order(plan: Plan) -> None:
    """UsageError for q and k in another order than the source's, which the layers cannot run
    with."""
    if any(part.weight is not part.linear.weight for unit in plan.units for part in unit.parts):
        raise UsageError(
            f"recipe {plan.recipe.name!r} runs the layers in the source's RoPE order; "
            "run `ckptq permute` on its result instead of --rope-order"
        )
