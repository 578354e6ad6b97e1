"""A quantized checkpoint as a source of weights: every tensor of the unquantized model, decoded.

Experts that the source fuses in one 3-D tensor and the output stores one by one are joined again
through the views that split them. q/k in half-split RoPE order are returned
to the order of the source, which transformers computes with.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.checkpoint.view import View, window
from ckptq.errors import SourceError
from ckptq.forward.source import CheckpointWeights, WeightSource
from ckptq.models.encoded import BELONGS_TO_SCHEME, read_encoded
from ckptq.models.family import family_of
from ckptq.models.published import Windows, windows_for, windows_of
from ckptq.models.readable import refuse_bare_codes
from ckptq.models.weight_rows import whole_weight
from ckptq.permute.effect import Part
from ckptq.permute.targets import read_permutation
from ckptq.plan.rope import Reordering, read_marks
from ckptq.rope_order import RopeOrder
from ckptq.spec import TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class DecodedWeights:
    """Weights of a quantized checkpoint under the names of the unquantized one.

    `like` is that unquantized checkpoint, whose names and shapes are used. Without it, names are
    those that the family is published under: the checkpoint's own without the quantization
    ("q_proj.weight" for "q_proj.weight_packed" and its scales), with the family's fused experts.
    """

    def __init__(self, ckpt: Checkpoint, like: Checkpoint | None = None) -> None:
        self._ckpt = ckpt
        self._encoded = read_encoded(ckpt)
        self._parts = {t.name for e in self._encoded.values() for t in e.tensors.values()}
        self._order = _reordering(ckpt, like)
        own = self._own_specs()
        self._windows = windows_for(ckpt, own)
        self._names: Collection[str] = _published(own, self._windows)
        if like is not None and like.quantization_config is not None:
            self._names = DecodedWeights(like).names()
        elif like is not None:
            self._names, self._windows = like.tensors.keys(), windows_of(like)

    @property
    def label(self) -> str:
        return str(self._ckpt.path)

    def names(self) -> Collection[str]:
        return self._names

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors on the CPU. SourceError for one that the checkpoint does not hold."""
        with Files() as files:
            return {name: self._tensor(files, name) for name in names}

    def _own_specs(self) -> dict[str, TensorSpec]:
        """The checkpoint's tensors, quantized ones decoded."""
        plain = [
            stored
            for name, stored in self._ckpt.tensors.items()
            if name not in self._parts and not BELONGS_TO_SCHEME.match(name)
        ]
        refuse_bare_codes(plain)
        own = {stored.name: stored.spec for stored in plain}
        return own | {f"{module}.weight": e.spec for module, e in self._encoded.items()}

    def _tensor(self, files: Files, name: str) -> Tensor:
        whole = self._whole(files, name)
        if whole is not None:
            return whole
        if name in self._windows:
            return self._assembled(files, name)
        raise SourceError(f"{self.label}: holds no tensor for {name!r} of the unquantized model")

    def _whole(self, files: Files, name: str) -> Tensor | None:
        """A tensor that is one Linear's weight, or is stored unchanged; None if it is neither."""
        module, _, local = name.rpartition(".")
        encoded = self._encoded.get(module) if local == "weight" else None
        if encoded is not None:
            return self._in_order(encoded.stored, whole_weight(files, encoded))
        if name in self._ckpt.tensors and name not in self._parts:
            stored = self._ckpt.tensors[name]
            return self._in_order(stored, read_tensor(stored, files))
        return None

    def _assembled(self, files: Files, name: str) -> Tensor:
        """A fused tensor, from its stored Linears."""
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
                    f"{self.label}: {part!r} is {list(found.shape)}, expected {list(place.shape)}"
                )
            place.copy_(found.view(place.shape))
        return made

    def _in_order(self, stored: StoredTensor, tensor: Tensor) -> Tensor:
        """q/k in the order that transformers computes with; any other tensor as it is."""
        effect = self._order.effect_on(stored) if self._order is not None else None
        if self._order is None or effect is None:
            return tensor
        from ckptq.permute.apply import permute_tensor

        return permute_tensor(tensor, effect, self._order.to)


def _published(own: Collection[str], windows: Windows) -> tuple[str, ...]:
    """The names with the parts of fused tensors replaced by these."""
    parts = {name for cut in windows.values() for name, _ in cut}
    return (*(name for name in own if name not in parts), *windows)


def weights_of(ckpt: Checkpoint, pinned: bool = False) -> WeightSource:
    """The weights of a checkpoint: as stored, or dequantized.

    `pinned` reads them into memory that a GPU can copy from directly, if they are not decoded.
    """
    if ckpt.quantization_config is None:
        return CheckpointWeights(ckpt, pinned)
    return DecodedWeights(ckpt)


def _place(made: Tensor, view: View) -> Tensor:
    """The place of a part in the fused tensor."""
    _, _, first, last = view.slab
    matrix = made if view.index is None else made[view.index]
    return window(matrix[first:last], view)


def _reordering(ckpt: Checkpoint, like: Checkpoint | None) -> Reordering | None:
    """The way back to the order that transformers wants q/k in; None where they are in it.

    By ckptq's marks; without a mark q/k are in the order in which their family is published.
    """
    published = RopeOrder(family_of(ckpt.config).rope)
    wanted = read_marks(like).get(Part.WEIGHTS, published) if like is not None else published
    if read_marks(ckpt).get(Part.WEIGHTS, published) is wanted:
        return None
    return Reordering(read_permutation(ckpt), wanted, frozenset({Part.WEIGHTS}))
