"""The program in a process of its own, on a machine that fails: calls on some files are errors.

Forked from a server that has done its imports, as in `convert_killed`.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_killed import SECONDS, server

Fault = tuple[str, str, int, int]
"""(function of `os`, part of the file's path, errno, calls that go well before); a part that ends
in "$" is the end of the path."""


@dataclass(frozen=True, slots=True)
class Done:
    """A process that has ended, and what it said."""

    code: int
    stdout: str
    stderr: str


def ckptq(*arguments: object, faults: tuple[Fault, ...] = (), descriptors: int = 1024) -> Done:
    """Run the program to its end."""
    with tempfile.TemporaryDirectory() as folder:
        said = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        words = [str(argument) for argument in arguments]
        process = server.Process(target=_main, args=(words, faults, descriptors, said))
        process.start()
        process.join(SECONDS)
        assert process.exitcode is not None, f"{words} hangs"
        return Done(process.exitcode, *(Path(file).read_text() for file in said))


def _main(words: list[str], faults: tuple[Fault, ...], descriptors: int, said: list[str]) -> None:
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    sys.argv = ["ckptq", *words]
    from ckptq.__main__ import main

    for name in {fault[0] for fault in faults}:
        mine = [list(fault[1:]) for fault in faults if fault[0] == name]
        setattr(os, name, _failing(getattr(os, name), mine))
    main()


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
