"""The program in a process of its own, on a machine that fails: calls on some files are errors."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from tiny import forked

Fault = tuple[str, str, int, int]
"""(function of `os`, part of the file's path, errno, calls that go well before); a part that ends
in "$" is the end of the path."""


def ckptq(
    *arguments: object, faults: tuple[Fault, ...] = (), descriptors: int = 1024
) -> CompletedProcess[str]:
    """Run the program to its end."""
    return forked.ckptq(*arguments, first=partial(_worsen, faults, descriptors))


def _worsen(faults: tuple[Fault, ...], descriptors: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    for name in {fault[0] for fault in faults}:
        mine = [list(fault[1:]) for fault in faults if fault[0] == name]
        setattr(os, name, _failing(getattr(os, name), mine))


def _failing(function: Callable[..., Any], faults: list[list[Any]]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        paths = [_path_of(arg) for arg in args[:2]]
        for fault in faults:
            part, number, left = fault
            if any(f"{path}$".find(part) >= 0 for path in paths):
                fault[2] -= 1
                if left <= 0:
                    raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    return call


def _path_of(arg: object) -> str:
    """Of a path or an open file."""
    if isinstance(arg, int):
        try:
            return os.readlink(f"/proc/self/fd/{arg}")
        except OSError:
            return ""
    return str(arg) if isinstance(arg, str | Path) else ""
