"""Where a model's weights come from: a checkpoint, or something that acts like one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from ckptq.checkpoint.open import Checkpoint
from ckptq.forward.reader import Reader


class WeightSource(Protocol):
    """A source of weights: the checkpoint itself, or something that dequantizes it."""

    @property
    def label(self) -> str:
        """Its name in messages: a path."""
        ...

    def names(self) -> Collection[str]:
        """Every tensor it can give, by its name in the *unquantized* checkpoint."""
        ...

    def announce(self, names: Collection[str]) -> None:
        """These are loaded next: begin to read them, if there is room."""
        ...

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors, on the device of its reader; another source may have them too, so they
        are not to be written to."""
        ...


class CheckpointWeights:
    """The tensors of a checkpoint as they are stored."""

    def __init__(self, ckpt: Checkpoint, reader: Reader | None = None) -> None:
        self._ckpt = ckpt
        self._reader = reader or Reader()

    @property
    def label(self) -> str:
        return str(self._ckpt.path)

    def names(self) -> Collection[str]:
        return self._ckpt.tensors.keys()

    def announce(self, names: Collection[str]) -> None:
        self._reader.begin_early([self._ckpt.tensors[name] for name in names])

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        self._reader.begin([self._ckpt.tensors[name] for name in names])
        return {name: self._reader.take(self._ckpt.tensors[name]) for name in names}
