"""A quantized checkpoint as a source of weights: every tensor of the unquantized model, decoded.

Experts that the source fuses in one 3-D tensor and the output stores one by one are joined again
through the views that split them. q/k in half-split RoPE order are returned
to the order of the source, which transformers computes with.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import SourceError
from ckptq.forward.reader import Reader
from ckptq.forward.source import CheckpointWeights, WeightSource
from ckptq.models.encoded import BELONGS_TO_SCHEME, Encoded, decode, read_encoded
from ckptq.models.family import family_of
from ckptq.models.published import Windows, windows_for, windows_of
from ckptq.models.quantized.readable import refuse_bare_codes
from ckptq.models.weight_rows import place_of
from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Part
from ckptq.permute.targets import read_permutation
from ckptq.plan.rope import Reordering, read_marks
from ckptq.quantize.coded import Coded, Keep
from ckptq.rope_order import RopeOrder
from ckptq.spec import TensorSpec, torch_dtype


class DecodedWeights:
    """Weights of a quantized checkpoint under the names of the unquantized one.

    `like` is that unquantized checkpoint, whose names and shapes are used. Without it, names are
    those that the family is published under: the checkpoint's own without the quantization
    ("q_proj.weight" for "q_proj.weight_packed" and its scales), with the family's fused experts.
    `keep` gets the codes of every weight that is loaded, in the order in which they are stored.
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        like: Checkpoint | None = None,
        reader: Reader | None = None,
        keep: Keep | None = None,
    ) -> None:
        self._ckpt = ckpt
        self._keep = keep
        self._reader = reader or Reader()
        self._encoded = {e.plain: e for e in read_encoded(ckpt).values()}
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

    def announce(self, names: Collection[str]) -> None:
        self._reader.begin_early(self._stored(names))

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors, decoded on the reader's device. SourceError for one that the checkpoint
        does not hold."""
        self._reader.begin(self._stored(names))
        return {name: self._tensor(name) for name in names}

    def _stored(self, names: Collection[str]) -> list[StoredTensor]:
        """What these are made of, as far as the checkpoint holds it."""
        found: list[StoredTensor] = []
        for name in names:
            lone = [name] if self._held(name) else [part for part, _ in self._windows.get(name, ())]
            for held in map(self._held, lone):
                if held is not None:
                    found += held.tensors.values() if isinstance(held, Encoded) else [held]
        return found

    def _own_specs(self) -> dict[str, TensorSpec]:
        """The checkpoint's tensors, quantized ones decoded."""
        plain = [
            stored
            for name, stored in self._ckpt.tensors.items()
            if name not in self._parts and not BELONGS_TO_SCHEME.match(name)
        ]
        refuse_bare_codes(plain)
        own = {stored.name: stored.spec for stored in plain}
        return own | {name: e.written for name, e in self._encoded.items()}

    def _tensor(self, name: str) -> Tensor:
        whole = self._whole(name)
        if whole is not None:
            return whole
        if name in self._windows:
            return self._assembled(name)
        raise SourceError(f"{self.label}: holds no tensor for {name!r} of the unquantized model")

    def _held(self, name: str) -> Encoded | StoredTensor | None:
        """A quantized weight, or a tensor that is stored unchanged; None if it is neither."""
        if name in self._encoded:
            return self._encoded[name]
        return self._ckpt.tensors.get(name) if name not in self._parts else None

    def _whole(self, name: str) -> Tensor | None:
        held = self._held(name)
        if isinstance(held, Encoded):
            tensors = held.whole(self._reader.take)
            if self._keep is not None:
                self._keep(held.name, Coded(tensors, held.scheme, held.shape))
            made = decode(held, tensors, held.shape[0]).view(held.written.shape)
            return self._in_order(held.stored, made)
        return None if held is None else self._in_order(held, self._reader.take(held))

    def _assembled(self, name: str) -> Tensor:
        """A fused tensor, from its stored Linears."""
        stored = self._windows[name][0][1].stored
        dtype = torch_dtype(stored.spec.dtype)
        made = torch.empty(stored.spec.shape, dtype=dtype, device=self._reader.device)
        for part, view in self._windows[name]:
            found = self._whole(part)
            if found is None:
                raise SourceError(f"{self.label}: holds no {part!r}, a part of {name!r}")
            place = place_of(made, view)
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
        return permute_tensor(tensor, effect, self._order.to)


def _published(own: Collection[str], windows: Windows) -> tuple[str, ...]:
    """The names with the parts of fused tensors replaced by these."""
    parts = {name for cut in windows.values() for name, _ in cut}
    return (*(name for name in own if name not in parts), *windows)


def weights_of(ckpt: Checkpoint, reader: Reader | None = None) -> WeightSource:
    """The weights of a checkpoint: as stored, or dequantized."""
    if ckpt.quantization_config is None:
        return CheckpointWeights(ckpt, reader)
    return DecodedWeights(ckpt, reader=reader)


def _reordering(ckpt: Checkpoint, like: Checkpoint | None) -> Reordering | None:
    """The way back to the order that transformers wants q/k in; None where they are in it.

    By ckptq's marks; without a mark q/k are in the order in which their family is published.
    """
    published = RopeOrder(family_of(ckpt.config).rope)
    wanted = read_marks(like).get(Part.WEIGHTS, published) if like is not None else published
    if read_marks(ckpt).get(Part.WEIGHTS, published) is wanted:
        return None
    return Reordering(read_permutation(ckpt), wanted, frozenset({Part.WEIGHTS}))
