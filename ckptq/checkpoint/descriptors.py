"""Open files shared by all threads, never more than the system allows a process.

A checkpoint may have more shards than `ulimit -n` allows; unused ones are closed, least
recently used first, and reopened on demand.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOST = 512
"""More open at once make nothing faster."""


def most_open() -> int:
    """A quarter of what the process may have: sources, outputs and other files are open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(min(soft // 4, MOST), 1)


@dataclass(slots=True)
class _Held:
    descriptor: int
    users: int = 0


class Descriptors:
    """File descriptors by path."""

    def __init__(self, opener: Callable[[Path], int], most: int | None = None) -> None:
        """`opener` opens a file on demand; what it raises, `lease` raises."""
        self._opener = opener
        self._most = most_open() if most is None else most
        self._held: OrderedDict[Path, _Held] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def lease(self, file: Path) -> Iterator[int]:
        """A descriptor that stays open inside the block."""
        with self._lock:
            held = self._find(file)
            held.users += 1
        try:
            yield held.descriptor
        finally:
            with self._lock:
                held.users -= 1

    def close(self) -> None:
        """Close all of them; there must be no lease left."""
        with self._lock:
            while self._held:
                os.close(self._held.popitem()[1].descriptor)

    def _find(self, file: Path) -> _Held:
        if file in self._held:
            self._held.move_to_end(file)
            return self._held[file]
        self._close_idle(len(self._held) - self._most + 1)
        try:
            descriptor = self._opener(file)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._close_idle(MOST):
                raise
            descriptor = self._opener(file)
        held = self._held[file] = _Held(descriptor)
        return held

    def _close_idle(self, count: int) -> int:
        """Close up to this many unused ones; returns how many were closed."""
        idle = [file for file, held in self._held.items() if not held.users][: max(count, 0)]
        for file in idle:
            os.close(self._held.pop(file).descriptor)
        return len(idle)
