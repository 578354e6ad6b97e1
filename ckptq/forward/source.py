"""Where a model's weights come from: a checkpoint, or something that acts like one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import Files, bytes_of, read_into, read_tensors
from ckptq.spec import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

READERS = 4
"""Threads that read a layer for a GPU; one alone is slower than the GPU computes."""

READ_BYTES = 1 << 24


class WeightSource(Protocol):
    """A source of weights: the checkpoint itself, or something that dequantizes it."""

    @property
    def label(self) -> str:
        """Its name in messages: a path."""
        ...

    def names(self) -> Collection[str]:
        """Every tensor it can give, by its name in the *unquantized* checkpoint."""
        ...

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU or the device, in memory that the caller may keep."""
        ...


class CheckpointWeights:
    """The tensors of a checkpoint as they are stored."""

    def __init__(self, ckpt: Checkpoint, pinned: bool = False) -> None:
        self._ckpt = ckpt
        self._pinned = pinned

    @property
    def label(self) -> str:
        return str(self._ckpt.path)

    def names(self) -> Collection[str]:
        return self._ckpt.tensors.keys()

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        stored = {name: self._ckpt.tensors[name] for name in names}
        return read_pinned(stored) if self._pinned else read_tensors(stored)


def read_pinned(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Whole tensors in pinned memory, read by several threads; a GPU copies from it directly."""
    import torch

    tensors = {
        name: torch.empty(t.spec.shape, dtype=torch_dtype(t.spec.dtype), pin_memory=True)
        for name, t in stored.items()
    }
    with Files() as files, ThreadPoolExecutor(READERS) as pool:
        tasks = [
            pool.submit(read_into, files, t, start, bytes_of(tensors[name])[start:][:READ_BYTES])
            for name, t in stored.items()
            for start in range(0, t.nbytes, READ_BYTES)
        ]
        for task in tasks:
            task.result()
    return tensors
