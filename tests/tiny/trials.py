"""What trials by random damage share: a limit of time, memory by the system, places in JSON.

`reset_peak()` before a trial and `memory("VmHWM")` after it differ by what the trial took.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TooSlow(BaseException):
    """No error that a command might catch by mistake."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TooSlow in what takes longer. In the main thread only: it is SIGALRM that tells."""

    def alarmed(*_: object) -> None:
        raise TooSlow(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, alarmed)
    # again and again: Python drops what is raised in a destructor or a callback of its collector
    signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reset_peak() -> int:
    """Forget the process's peak; MB that it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(what: str) -> int:
    """MB, of this process: VmHWM is the peak, VmRSS what it holds."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container in a JSON value, however deep, with each key in it."""
    found, todo = [], [value]
    while todo:
        holder = todo.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, item in list(items):
            found.append((holder, key))
            if isinstance(item, dict | list):
                todo.append(item)
    return found
