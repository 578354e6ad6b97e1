"""A model's weights, some of them as their codes stand for them: what the second run reads.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from ckptq.forward.source import WeightSource
from ckptq.models.encoded import Encoded
from ckptq.models.weight_rows import place_of
from ckptq.plan.unit import Part
from ckptq.quantize.formats import dequantize
from ckptq.spec import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Rewritten:
    """A `WeightSource` of which some Linears are quantized, and decoded again."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._parts: dict[str, list[Part]] = {}
        self._made: Mapping[str, Tensor] = {}

    @property
    def label(self) -> str:
        return self._source.label

    def names(self) -> Collection[str]:
        return self._source.names()

    def announce(self, names: Collection[str]) -> None:
        self._source.announce(names)

    def rewrite(self, parts: Iterable[Part], made: Mapping[str, Tensor]) -> None:
        """From here on these Linears weigh what their stored tensors stand for, and no others."""
        self._parts, self._made = {}, made
        for part in parts:
            self._parts.setdefault(_source_name(part), []).append(part)

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        found = self._source.load(names)
        for name in found.keys() & self._parts.keys():
            found[name] = self._changed(found[name], self._parts[name])
        return found

    def _changed(self, stored: Tensor, parts: Iterable[Part]) -> Tensor:
        stored = stored.clone()  # it may be others' too
        for part in parts:
            window = part.linear.weight
            place = stored if isinstance(window, Encoded) else place_of(stored, window)
            place.copy_(self.weight(part).to(stored.device))
        return stored

    def weight(self, part: Part) -> Tensor:
        """[R, C]: what the Linear's stored tensors stand for."""
        held = {local: self._made[f"{part.linear.name}.{local}"] for local in part.writes}
        spec = part.weight.spec
        return dequantize(held, part.scheme, spec.shape, torch_dtype(spec.dtype))


def _source_name(part: Part) -> str:
    """What the source calls the tensor that holds the Linear's weight."""
    window = part.linear.weight
    return f"{part.linear.name}.weight" if isinstance(window, Encoded) else window.stored.name
