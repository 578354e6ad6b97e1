"""A quantized checkpoint as a source of weights: every tensor of the unquantized model, decoded.

Experts that the source fuses in one 3-D tensor and the output stores one by one are put together
again through the windows that cut them apart. q/k that were written in half-split RoPE order go
back to the order of the source, which is the one that transformers computes with.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.checkpoint.view import View, window
from ckptq.errors import SourceError
from ckptq.models.encoded import BELONGS_TO_SCHEME, Encoded, decode_rows, read_encoded
from ckptq.models.family import family_of
from ckptq.models.modules import Layout, decoder_layers, read_layout
from ckptq.permute.effect import Part
from ckptq.permute.order import Heads, RopeOrder
from ckptq.permute.targets import PROJECTIONS, head_geometry
from ckptq.plan.rope import read_marks
from ckptq.spec import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class DecodedWeights:
    """Weights of a quantized checkpoint under the names of the unquantized one.

    `like` is that unquantized checkpoint: its names and shapes are given. Without it the names are
    the checkpoint's own with the quantization taken off ("q_proj.weight" for "q_proj.weight_packed"
    and its scales), which is what transformers calls them where experts are stored one by one.
    """

    def __init__(self, ckpt: Checkpoint, like: Checkpoint | None = None) -> None:
        self._ckpt = ckpt
        self._encoded = read_encoded(ckpt)
        self._parts = {t.name for e in self._encoded.values() for t in e.tensors.values()}
        self._windows: Mapping[str, tuple[tuple[str, View], ...]] = {}
        self._turned = _turned(ckpt, like)
        self._names: Collection[str] = self._own_names()
        if like is not None and like.quantization_config is not None:
            self._names = DecodedWeights(like).names()
        elif like is not None:
            self._names, self._windows = like.tensors.keys(), _windows(like)

    @property
    def label(self) -> str:
        return str(self._ckpt.path)

    def names(self) -> Collection[str]:
        return self._names

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors on the CPU. SourceError names one that the checkpoint does not hold."""
        with Files() as files:
            return {name: self._tensor(files, name) for name in names}

    def _own_names(self) -> tuple[str, ...]:
        plain = [
            name
            for name in self._ckpt.tensors
            if name not in self._parts and not BELONGS_TO_SCHEME.match(name)
        ]
        return (*plain, *(f"{module}.weight" for module in self._encoded))

    def _tensor(self, files: Files, name: str) -> Tensor:
        whole = self._whole(files, name)
        if whole is not None:
            return whole
        if name in self._windows:
            return self._assembled(files, name)
        raise SourceError(f"{self.label}: holds no tensor for {name!r} of the unquantized model")

    def _whole(self, files: Files, name: str) -> Tensor | None:
        """A tensor that is one Linear's weight, or is stored as it is; None where it is neither."""
        module, _, local = name.rpartition(".")
        encoded = self._encoded.get(module) if local == "weight" else None
        if encoded is not None:
            return self._in_order(module, _decoded(files, encoded))
        if name in self._ckpt.tensors and name not in self._parts:
            return self._in_order(module, read_tensor(self._ckpt.tensors[name], files))
        return None

    def _assembled(self, files: Files, name: str) -> Tensor:
        """A fused tensor, from what its Linears are stored as."""
        import torch

        stored = self._windows[name][0][1].stored
        made = torch.empty(stored.spec.shape, dtype=torch_dtype(stored.spec.dtype))
        for part, view in self._windows[name]:
            found = self._whole(files, part)
            if found is None:
                raise SourceError(f"{self.label}: holds no {part!r}, a part of {name!r}")
            place = _place(made, view)
            if found.numel() != place.numel():
                raise SourceError(
                    f"{self.label}: {part!r} is {list(found.shape)}, wanted {list(place.shape)}"
                )
            place.copy_(found.view(place.shape))
        return made

    def _in_order(self, module: str, tensor: Tensor) -> Tensor:
        """q/k in the order that transformers computes with."""
        return self._turned.back(module, tensor) if self._turned is not None else tensor


def _decoded(files: Files, encoded: Encoded) -> Tensor:
    return decode_rows(files, encoded, 0, encoded.spec.shape[0])


def _windows(like: Checkpoint) -> dict[str, tuple[tuple[str, View], ...]]:
    """Fused tensor of the source -> (name of the part in the output, its window)."""
    found: dict[str, list[tuple[str, View]]] = {}
    for name, view in _parts(read_layout(like)):
        if view.index is not None or view.vector:
            found.setdefault(view.stored.name, []).append((name, view))
    return {name: tuple(parts) for name, parts in found.items()}


def _parts(layout: Layout) -> Iterator[tuple[str, View]]:
    for linear in layout.linears.values():
        if isinstance(linear.weight, View):
            yield f"{linear.name}.weight", linear.weight
        if linear.bias is not None:
            yield f"{linear.name}.bias", linear.bias


def _place(made: Tensor, view: View) -> Tensor:
    """Where a part lies in the fused tensor."""
    _, _, first, last = view.slab
    matrix = made if view.index is None else made[view.index]
    return window(matrix[first:last], view)


@dataclass(frozen=True, slots=True)
class Turned:
    """q/k projections whose rows are in another order than transformers wants them in."""

    layers: str
    heads: Mapping[str, Heads]
    to: RopeOrder

    def back(self, module: str, tensor: Tensor) -> Tensor:
        """The rows of a q/k projection's weight or bias in order; any other tensor as it is."""
        side = PROJECTIONS.get(module.rpartition(".")[2])
        if side is None or not module.startswith(self.layers + "."):
            return tensor
        from ckptq.permute.apply import permute_rows

        return permute_rows(tensor, self.heads[side], self.to)


def _turned(ckpt: Checkpoint, like: Checkpoint | None) -> Turned | None:
    """By ckptq's marks; without a mark q/k are in the order in which their family is published."""
    published = RopeOrder(family_of(ckpt.config).rope)
    wanted = read_marks(like).get(Part.WEIGHTS, published) if like is not None else published
    if read_marks(ckpt).get(Part.WEIGHTS, published) is wanted:
        return None
    return Turned(decoder_layers(ckpt)[0], head_geometry(ckpt.text_config), wanted)


def stored_scales(ckpt: Checkpoint, suffix: str) -> dict[str, StoredTensor]:
    """Module -> its tensor with this local name, e.g. "k_scale" of every attention."""
    return {
        name.rpartition(".")[0]: tensor
        for name, tensor in ckpt.tensors.items()
        if name.rpartition(".")[2] == suffix
    }
