"""One decoder layer after the other tuned by AutoRound, while calibration runs them.

Two streams go through the layers: what unquantized layers make of the samples, which calibration
sees, and what the tuned ones make of them. A layer is given the second, and learns to make of it
what it made of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.autoround.block import Block, Call, Target
from ckptq.autoround.linear_tensors import stored_tensors, target_of
from ckptq.errors import PlanError
from ckptq.forward.layerwise import LayerwiseModel, Stream
from ckptq.forward.source import WeightSource
from ckptq.gptq.kept import kept_in
from ckptq.gptq.told import Told
from ckptq.plan.unit import Part, Plan, Unit
from ckptq.quantize.formats import constants, merge_statistic, needs_statistic, statistic

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class LayerTuner:
    """Tunes what a plan quantizes of each decoder layer that is run."""

    again = True
    """A layer runs again, with its own weights, for what the next one is given."""

    def __init__(self, plan: Plan, folder: Path, device: torch.device) -> None:
        """`folder` keeps the finished layers."""
        self._plan, self._device = plan, device
        self.kept = kept_in(folder)

    def weights(self, source: WeightSource) -> WeightSource:
        """What the model is to read: the source."""
        return source

    def holds(self, layers: range) -> bool:
        """Whether these are finished, and as they were written."""
        return self.kept.holds(layers)

    def holds_all(self) -> bool:
        return self.holds(range(self._plan.layout.num_layers))

    def watched(self, *_: object) -> AbstractContextManager[None]:
        """Nothing is gathered while the layer runs."""
        return nullcontext()

    def finish(self, model: LayerwiseModel, index: int, stream: Stream) -> None:
        """Tune a layer that has run on all batches, and keep the result."""
        assert self._plan.recipe.tuning is not None
        name = model.layer_names[index]
        layer = model.skeleton.layers[name]
        block = Block(layer, model.skeleton.model.config, self._device)
        units = self._units(model, name)
        parts = _by_module(model, name, block, units)
        statistics = _statistics(parts, block, units)
        tuned, stream.quantized = block.tune(
            _targets(parts, statistics),
            list(_calls(layer, stream, index)),
            stream.quantized,
            self._plan.recipe.tuning,
        )
        made: dict[str, Tensor] = {}
        for local, part in parts.items():
            made |= stored_tensors(part, tuned[local], statistics.get(part.linear.name))
        nearest = [part.linear.name for local, part in parts.items() if local not in block.reached]
        self.kept.keep(index, made, Told(nearest=nearest).to_json())

    def _units(self, model: LayerwiseModel, name: str) -> list[Unit]:
        """What of a layer is quantized."""
        prefix = model.loader.stored_module(name) + "."
        quantized = (unit for unit in self._plan.units if unit.parts)
        return [unit for unit in quantized if unit.parts[0].linear.name.startswith(prefix)]


def _calls(layer: nn.Module, stream: Stream, index: int) -> Iterator[Call]:
    """What the layer is called with for each sample, all but the hidden states by name."""
    names = list(signature(layer.forward).parameters)[1:]
    for hidden_1SE, calls in zip(stream.hidden_BSE, stream.arguments, strict=True):
        args, kwargs = calls[index]
        yield (hidden_1SE.cpu(),), {**dict(zip(names, args, strict=False)), **kwargs}


def _by_module(
    model: LayerwiseModel, name: str, block: Block, units: list[Unit]
) -> dict[str, Part]:
    """Each Linear of a layer called `name` that is to be tuned, by its name in it.

    PlanError for one that the layer does not have as a Linear.
    """
    own = dict(model.skeleton.layers[name].named_modules())
    stored = {_stored(model, name, local, local in own): local for local in block.linears}
    found = {}
    for part in (part for unit in units for part in unit.parts):
        linear = part.linear.name
        local = stored.get(linear) or stored.get(_renamed(linear))
        if local is None or block.linears[local].weight.shape != part.weight.spec.shape:
            raise PlanError(
                f"{linear} is no Linear of {type(model.skeleton.model).__name__} in transformers, "
                "so AutoRound cannot tune it; name it in the recipe's `ignore`, or use -refined"
            )
        found[local] = part
    return found


def _stored(model: LayerwiseModel, name: str, local: str, own: bool) -> str:
    """A Linear's name on disk. One that was made of fused experts, and is not the layer's `own`, is
    called after the module of these."""
    if own:
        return model.loader.stored_module(f"{name}.{local}")
    experts, number, projection = f"{name}.{local}".rsplit(".", 2)
    return f"{model.loader.stored_module(experts)}.{number}.{projection}"


def _renamed(linear: str) -> str:
    """Mixtral's names of projections in transformers' words."""
    head, _, last = linear.rpartition(".")
    return f"{head}.{MIXTRAL.get(last, last)}"


def _statistics(parts: dict[str, Part], block: Block, units: list[Unit]) -> dict[str, Tensor]:
    """Linear -> the one number that it has in common with those that inference fuses it with."""
    weights = {part.linear.name: block.linears[local].weight for local, part in parts.items()}
    found: dict[str, Tensor] = {}
    for unit in units:
        shared = [part for part in unit.parts if needs_statistic(part.scheme)]
        if shared:
            each = (statistic(weights[p.linear.name].detach(), p.scheme) for p in shared)
            common = reduce(merge_statistic, each).cpu()  # as all that AutoRound returns
            found |= dict.fromkeys((p.linear.name for p in shared), common)
    return found


def _targets(parts: dict[str, Part], statistics: dict[str, Tensor]) -> dict[str, Target]:
    found = {}
    for local, part in parts.items():
        fixed = constants(part.weight.spec, part.scheme, statistics.get(part.linear.name))
        found[local] = target_of(part, fixed.get("weight_global_scale"))
    return found
