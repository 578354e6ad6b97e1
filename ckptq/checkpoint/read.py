"""Read tensor data: whole tensors, and runs of rows into a buffer that the caller keeps.

Plain positioned reads, not a memory map: pages of a map count as the process's own memory, and a
file that shrinks under a map kills the process instead of raising.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.checkpoint.descriptors import Descriptors
from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.hub.remote_file import RemoteFile
from ckptq.checkpoint.identity import Identity, check_same, check_unchanged
from ckptq.errors import SourceError
from ckptq.files import reading_errors
from ckptq.spec import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_READ = 1 << 30
"""Linux hands out at most 2 GiB a call."""


class Files:
    """The files of a checkpoint while it is read, shared by all threads, closed together.

    Whenever one is opened, it must be the one whose header was read.
    """

    def __init__(self) -> None:
        self._wanted: dict[Path, Identity] = {}
        self._open = Descriptors(self._open_same)

    @contextmanager
    def reading(self, stored: StoredTensor) -> Iterator[int]:
        """A descriptor of the tensor's file, open inside the block.

        SourceError if the file has changed since its header was read, MachineError if the machine
        fails.
        """
        assert not isinstance(stored.identity, RemoteFile), f"{stored.file}: is on the hub"
        if stored.identity is not None:
            self._wanted.setdefault(stored.file, stored.identity)
        with reading_errors(stored.file), self._open.lease(stored.file) as descriptor:
            yield descriptor

    def check_unchanged(self) -> None:
        """SourceError if a file that was read has changed."""
        check_unchanged(dict(self._wanted))

    def _open_same(self, file: Path) -> int:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if file in self._wanted:
            try:
                check_same(file, self._wanted[file], Identity.of(os.fstat(descriptor)))
            except SourceError:
                os.close(descriptor)
                raise
        return descriptor

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_into(files: Files, stored: StoredTensor, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with the tensor's bytes, from byte `start` on."""
    if isinstance(stored.identity, RemoteFile):
        stored.identity.read_into(stored.offset + start, buffer)
        return
    with files.reading(stored) as descriptor:
        read_bytes(stored, descriptor, stored.offset + start, buffer)


def read_bytes(stored: StoredTensor, descriptor: int, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of the tensor's open file from byte `offset` on."""
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done : done + MAX_READ]], offset + done)
        if got == 0:
            raise SourceError(
                f"{stored.file}: tensor {stored.name!r}: the file ends at byte {offset + done}, "
                f"expected {stored.offset + stored.nbytes}; it changed while it was read"
            )
        done += got


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, for reading and writing in place."""
    import torch

    assert tensor.is_contiguous(), "only a dense tensor has bytes in file order"
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Memory(threading.local):
    """Memory that each thread reuses: faulting in fresh pages takes longer than copying into
    them."""

    def __init__(self, pinned: bool = False) -> None:
        self._held: Tensor | None = None
        self._pinned = pinned
        """Whether a GPU may read it while the thread works."""

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A dense tensor of unknown content, in the memory of this thread's last one."""
        import torch

        nbytes = prod(shape) * dtype.itemsize
        if self._held is None or self._held.numel() < nbytes:
            self._held = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._held[:nbytes].view(dtype).view(shape)


def read_range(
    files: Files, stored: StoredTensor, start: int, stop: int, memory: Memory | None = None
) -> Tensor:
    """Entries start..stop along the first axis, as a tensor [stop - start, ...].

    In new memory, or in `memory`.
    """
    import torch

    shape, dtype = (stop - start, *stored.spec.shape[1:]), torch_dtype(stored.spec.dtype)
    tensor = torch.empty(shape, dtype=dtype) if memory is None else memory.tensor(shape, dtype)
    step = stored.nbytes // stored.spec.shape[0]
    read_into(files, stored, start * step, bytes_of(tensor))
    return tensor


def read_tensor(stored: StoredTensor, files: Files | None = None) -> Tensor:
    """The whole tensor on the CPU, in new memory."""
    import torch

    tensor = torch.empty(stored.spec.shape, dtype=torch_dtype(stored.spec.dtype))
    if tensor.numel():
        if files is not None:
            read_into(files, stored, 0, bytes_of(tensor))
        else:
            with Files() as opened:
                read_into(opened, stored, 0, bytes_of(tensor))
    return tensor


def read_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Several whole tensors, by the keys given."""
    with Files() as files:
        return {key: read_tensor(tensor, files) for key, tensor in stored.items()}
