"""The bytes of the hub that came last, shared by all threads: each is fetched once as long as reads
follow the order of the file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

CHUNK = 1 << 23
"""Bytes of one request: long enough to hide its latency, short enough to lose."""

MOST = 32
"""Chunks that are kept: 256 MB, several for each thread."""

HELD_BYTES = MOST * CHUNK

Key = tuple[Hashable, int]
"""A file and the number of the chunk."""


class Chunks:
    """Chunks of files by number; the least recently used go first."""

    def __init__(self) -> None:
        self.fetched = 0
        """Bytes that came over the network."""
        self._held: OrderedDict[Key, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key, fetch: Callable[[], bytes]) -> bytes:
        """The chunk, from memory or by `fetch`, whose error every thread that waits gets."""
        with self._lock:
            held = self._held.get(key)
            mine = held is None
            if held is None:
                held = self._held[key] = Future()
                while len(self._held) > MOST:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
        if mine:
            self._fill(key, held, fetch)
        return held.result()

    def count(self, nbytes: int) -> None:
        """Note that these bytes have arrived."""
        with self._lock:
            self.fetched += nbytes

    def _fill(self, key: Key, held: Future[bytes], fetch: Callable[[], bytes]) -> None:
        try:
            held.set_result(fetch())
        except BaseException as error:
            with self._lock:
                self._held.pop(key, None)
            held.set_exception(error)
