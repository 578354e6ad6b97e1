"""How ranks talk: gloo, between CPUs, in a group of ckptq's own.

Not torch's default group: libraries that find one divide what they do among its processes, and wait
for all of them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

from ckptq.errors import ProcessLost

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=1)
"""How long a rank may wait for the slowest."""

_NUMBERS = count()


class Group:
    """All ranks of one run. ProcessLost where one of them ends while others wait for it."""

    def __init__(self, rank: int, world: int) -> None:
        import torch.distributed as dist

        self._world = world
        store = dist.PrefixStore(f"ckptq-{next(_NUMBERS)}", _store())
        with _others_alive():
            self._gloo: Any = dist.ProcessGroupGloo(store, rank, world, PATIENCE)

    def gather(self, mine: Any) -> list[Any]:
        """What every rank gives, in their order, on each."""
        import torch

        data_N = _packed(mine)
        with _others_alive():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._world)]
            self._gloo.allgather([sizes], [torch.tensor([len(data_N)])]).wait()
            most = max(map(int, sizes))
            found = [torch.empty(most, dtype=torch.uint8) for _ in sizes]
            padded_N = torch.nn.functional.pad(data_N, (0, most - len(data_N)))
            self._gloo.allgather([found], [padded_N]).wait()
        return [_unpacked(each[: int(size)]) for each, size in zip(found, sizes, strict=True)]

    def broadcast(self, mine: Any, leads: bool) -> Any:
        """What rank 0 gives."""
        import torch

        data_N = _packed(mine) if leads else None
        with _others_alive():
            size = torch.tensor([len(data_N) if data_N is not None else 0])
            self._gloo.broadcast([size]).wait()
            if data_N is None:
                data_N = torch.empty(int(size), dtype=torch.uint8)
            self._gloo.broadcast([data_N]).wait()
        return mine if leads else _unpacked(data_N)

    def close(self) -> None:
        """End its threads, which may not outlive the interpreter."""
        self._gloo = None


@cache
def _store() -> Any:
    """Where torchrun lets its processes find each other."""
    import torch.distributed as dist

    with _others_alive():
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    return store


def _packed(value: Any) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(data_N: Tensor) -> Any:
    return pickle.loads(data_N.numpy().tobytes())


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost("another process of this run has ended, or cannot be reached") from error
