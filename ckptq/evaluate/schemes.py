"""A scheme applied to a source in memory: weights quantized and dequantized, layer by layer.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from typing import TYPE_CHECKING

from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.checkpoint.view import View, window
from ckptq.errors import SourceError
from ckptq.evaluate.inputs import InputScheme, input_scheme
from ckptq.evaluate.kv_cache import BF16, PER_HEAD, PER_TENSOR, KVCache
from ckptq.models.encoded import Encoded
from ckptq.models.weight_rows import whole_weight
from ckptq.plan.unit import Plan, Unit
from ckptq.quantize.formats import (
    NonFinite,
    constants,
    dequantize,
    merge_statistic,
    needs_statistic,
    quantize,
    statistic,
)
from ckptq.spec import torch_dtype
from ckptq.verify.roundtrip.tally import decibels

if TYPE_CHECKING:
    from torch import Tensor


class SchemeWeights:
    """The source's tensors, quantized by a plan and dequantized."""

    def __init__(self, ckpt: Checkpoint, plan: Plan) -> None:
        self._ckpt = ckpt
        self._layout = plan.layout
        self._recipe = plan.recipe.name
        self._parts = {part.linear.name: (unit, part) for unit in plan.units for part in unit.parts}
        self._shared: dict[str, Tensor] = {}
        self._signal, self._noise = 0.0, 0.0
        self._counted: set[str] = set()

    @property
    def label(self) -> str:
        return f"{self._ckpt.path} ({self._recipe})"

    @property
    def snr_db(self) -> float | None:
        """Signal to quantization noise of all weights loaded so far, in dB."""
        if not self._counted:
            return None
        return decibels(self._signal, self._noise)

    def names(self) -> Collection[str]:
        """Plain tensors under their own names; quantized ones are decoded."""
        encoded = [
            each for each in self._layout.linears.values() if isinstance(each.weight, Encoded)
        ]
        parts = {t.name for each in encoded for t in each.weight.tensors.values()}  # type: ignore[union-attr]
        hidden = parts | set(self._layout.dropped)
        plain = [name for name in self._ckpt.tensors if name not in hidden]
        return [*plain, *(f"{each.name}.weight" for each in encoded)]

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors on the CPU. SourceError names a weight that holds NaN or Inf."""
        with Files() as files:
            return {name: self._tensor(files, name) for name in names}

    def _tensor(self, files: Files, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module in self._layout.linears:
            return self._weight(files, module)
        linears = self._layout.consumed.get(name, ())
        if any(linear in self._parts for linear in linears):
            return self._fused(files, name, linears)
        return read_tensor(self._ckpt.tensors[name], files)

    def _fused(self, files: Files, name: str, linears: Collection[str]) -> Tensor:
        """Experts in one tensor: each part is quantized and written back to its place."""
        made = read_tensor(self._ckpt.tensors[name], files)
        for linear in linears:
            view = self._layout.linears[linear].weight
            assert isinstance(view, View), "only plain tensors hold several Linears"
            _, _, first, last = view.slab
            matrix = made if view.index is None else made[view.index]
            if linear in self._parts:
                window(matrix[first:last], view).copy_(self._weight(files, linear))
        return made

    def _weight(self, files: Files, linear: str) -> Tensor:
        """One weight [R, C], quantized and dequantized if the plan quantizes it."""
        weight = self._layout.linears[linear].weight
        w_RC = whole_weight(files, weight)
        if linear not in self._parts:
            return w_RC
        unit, part = self._parts[linear]
        try:
            shared = self._statistic(files, unit)
            made = {
                **constants(weight.spec, part.scheme, shared),
                **quantize(w_RC, part.scheme, shared),
            }
        except NonFinite as error:
            raise SourceError(f"{self._ckpt.path}: tensor {linear!r}: {error}") from error
        back_RC = dequantize(made, part.scheme, weight.spec.shape, torch_dtype(weight.spec.dtype))
        self._count(linear, w_RC, back_RC)
        return back_RC

    def _statistic(self, files: Files, unit: Unit) -> Tensor | None:
        """The one number that all parts of a unit share: q, k and v have one scale per tensor."""
        if not needs_statistic(unit.parts[0].scheme):
            return None
        if unit.key not in self._shared:
            found = (
                statistic(whole_weight(files, part.linear.weight), part.scheme)
                for part in unit.parts
            )
            self._shared[unit.key] = reduce(merge_statistic, found)
        return self._shared[unit.key]

    def _count(self, linear: str, w_RC: Tensor, back_RC: Tensor) -> None:
        if linear not in self._counted:
            self._counted.add(linear)
            self._signal += w_RC.double().square().sum().item()
            self._noise += (w_RC.double() - back_RC.double()).square().sum().item()


def planned_cache(plan: Plan) -> KVCache:
    """The cache of a plan's recipe, with scales measured on the given text."""
    if plan.attention is None:
        return BF16
    mode = PER_HEAD if plan.attention.strategy == "attn_head" else PER_TENSOR
    return KVCache(mode=mode, origin="this text")


def planned_inputs(plan: Plan) -> dict[str, InputScheme]:
    """How the recipe rounds the input of each Linear that it quantizes."""
    found: dict[str, InputScheme] = {}
    for group in plan.recipe.groups:
        if group.inputs is not None:
            scheme = input_scheme(group.inputs, group.name)
            found |= dict.fromkeys(plan.groups[group.name], scheme)
    return found
