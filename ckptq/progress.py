"""Progress callbacks: the console draws them; without one, work is silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Report = Callable[[str, int], None]
"""(what it is at, how much is done since the last call)"""


class Begin(Protocol):
    """Begins a task of `total` bytes, layers or whatever `unit` says."""

    def __call__(self, task: str, total: int, unit: str = "bytes") -> Report: ...


def silent(task: str, total: int, unit: str = "bytes") -> Report:
    """Progress for callers that show none."""
    return lambda what, done: None


Note = Callable[[str], None]
"""Receives one-line messages for the user."""


def untold(message: str) -> None:
    """A `Note` that discards its messages."""
