"""A scheme applied to a source in memory: weights quantized and dequantized, layer by layer.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial, reduce

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.view import View
from ckptq.errors import SourceError
from ckptq.evaluate.caches.kv_cache import BF16, PER_HEAD, PER_TENSOR, KVCache
from ckptq.evaluate.linears.inputs import InputScheme, input_scheme
from ckptq.evaluate.weights.noise import Noise
from ckptq.forward.reader import Reader
from ckptq.models.encoded import Encoded, decode
from ckptq.models.weight_rows import place_of, stored_of, whole_weight
from ckptq.plan.unit import Plan, Unit
from ckptq.quantize.coded import Coded, Keep
from ckptq.quantize.dispatch import dequantize, quantize
from ckptq.quantize.formats import NonFinite, merge_statistic, needs_statistic, statistic


class SchemeWeights:
    """The source's tensors, quantized by a plan and dequantized where they are: on a GPU, there."""

    def __init__(
        self,
        ckpt: Checkpoint,
        plan: Plan,
        reader: Reader | None = None,
        keep: Keep | None = None,
    ) -> None:
        """`keep` gets the codes of every weight that is loaded."""
        self._ckpt = ckpt
        self._keep = keep
        self._reader = reader or Reader()
        self._layout = plan.layout
        self._recipe = plan.recipe.name
        self._parts = {part.linear.name: (unit, part) for unit in plan.units for part in unit.parts}
        self._decoded = {weight.plain: weight for weight in plan.layout.decoded.values()}
        self._shared: dict[str, Tensor] = {}
        self._noise = Noise()
        self._finite: dict[str, Tensor] = {}
        """Of weights quantized by kernels: whether all is finite, on the device."""

    @property
    def label(self) -> str:
        return f"{self._ckpt.path} ({self._recipe})"

    @property
    def snr_db(self) -> float | None:
        """Signal to quantization noise of all weights loaded so far, in dB."""
        return self._noise.db

    def names(self) -> Collection[str]:
        """Plain tensors under their own names; quantized ones are decoded."""
        linears = (each.weight for each in self._layout.linears.values())
        encoded = [w for w in (*linears, *self._decoded.values()) if isinstance(w, Encoded)]
        parts = {tensor.name for weight in encoded for tensor in weight.tensors.values()}
        hidden = parts | set(self._layout.dropped)
        plain = [name for name in self._ckpt.tensors if name not in hidden]
        return [*plain, *(weight.plain for weight in encoded)]

    def announce(self, names: Collection[str]) -> None:
        self._reader.begin_early(self._stored(names))

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors on the reader's device. SourceError names a weight that holds NaN or
        Inf."""
        self._reader.begin(self._stored(names))
        made = {name: self._tensor(name) for name in names}
        self.check_finite()
        return made

    def check_finite(self) -> None:
        """Of all weights that were quantized since, in one wait for the device. SourceError names
        one that is not."""
        names, answers = list(self._finite), list(self._finite.values())
        self._finite.clear()
        if not answers:
            return
        bad = [n for n, good in zip(names, torch.stack(answers).tolist(), strict=True) if not good]
        if bad:
            raise SourceError(f"{self._ckpt.path}: tensor {bad[0]!r}: NaN or Inf")

    def _stored(self, names: Collection[str]) -> list[StoredTensor]:
        """What these are made of."""
        found: list[StoredTensor] = []
        for name in names:
            linear = self._layout.linears.get(name.removesuffix(".weight"))
            if name in self._decoded:
                found += self._decoded[name].tensors.values()
            else:
                found += [self._ckpt.tensors[name]] if linear is None else stored_of(linear.weight)
        return found

    def _tensor(self, name: str) -> Tensor:
        if name in self._decoded:
            weight = self._decoded[name]
            w_RC = decode(weight, weight.whole(self._reader.take), weight.shape[0])
            return w_RC.view(weight.written.shape)
        module = name.removesuffix(".weight")
        if module in self._layout.linears:
            return self._weight(module)
        linears = self._layout.consumed.get(name, ())
        if any(linear in self._parts for linear in linears):
            return self._fused(name, linears)
        return self._reader.take(self._ckpt.tensors[name])

    def _fused(self, name: str, linears: Collection[str]) -> Tensor:
        """Experts in one tensor: each part is quantized and written back to its place."""
        stored = self._reader.take(self._ckpt.tensors[name])
        made = stored.clone()
        for linear in linears:
            view = self._layout.linears[linear].weight
            assert isinstance(view, View), "only plain tensors hold several Linears"
            if linear in self._parts:
                w_RC = place_of(stored, view).contiguous()
                place_of(made, view).copy_(self.quantized(linear, w_RC))
        return made

    def _weight(self, linear: str) -> Tensor:
        """One weight [R, C], quantized and dequantized if the plan quantizes it."""
        w_RC = whole_weight(self._reader.take, self._layout.linears[linear].weight)
        return self.quantized(linear, w_RC) if linear in self._parts else w_RC

    def quantized(self, linear: str, w_RC: Tensor) -> Tensor:
        """The weight [R, C] after quantization and back, by kernels where the device has them;
        `check_finite` then says whether it was finite."""
        unit, part = self._parts[linear]
        try:
            shared = self._statistic(unit, linear, w_RC)
            made = quantize(w_RC, part.scheme, shared, partial(self._finite.__setitem__, linear))
        except NonFinite as error:
            raise SourceError(f"{self._ckpt.path}: tensor {linear!r}: {error}") from error
        R, C = w_RC.shape
        if self._keep is not None:
            self._keep(linear, Coded(made, part.scheme, (R, C)))
        back_RC = dequantize(made, part.scheme, (R, C), w_RC.dtype)
        self._noise.count(linear, w_RC, back_RC)
        return back_RC

    def _statistic(self, unit: Unit, linear: str, w_RC: Tensor) -> Tensor | None:
        """The one number that all parts of a unit share: q, k and v have one scale per tensor."""
        if not needs_statistic(unit.parts[0].scheme):
            return None
        if unit.key not in self._shared:
            others = (part for part in unit.parts if part.linear.name != linear)
            mine = next(part for part in unit.parts if part.linear.name == linear)
            found = [statistic(w_RC, mine.scheme)]
            found += [
                statistic(whole_weight(self._reader.take, part.linear.weight), part.scheme)
                for part in others
            ]
            self._shared[unit.key] = reduce(merge_statistic, found)
        return self._shared[unit.key]


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
