"""ckptq in processes of their own that are forked from a server which has done the imports: a
command begins after milliseconds instead of seconds."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

SECONDS = 60

STREAMS = {"stdout": "strict", "stderr": "backslashreplace"}
"""What Python does with letters that they cannot take."""

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        *("ckptq.__main__", "ckptq.convert.pipeline", "ckptq.gptq.layers", "ckptq.evaluate.run"),
        *("ckptq.verify.one_pass", "transformers.models.llama.modeling_llama"),
        *("transformers.models.mixtral.modeling_mixtral", "compressed_tensors.quantization"),
    ]
)


def process(target: Callable[..., None], *args: object) -> multiprocessing.Process:
    """One that the server forks when it is started."""
    return server.Process(target=_begin, args=(target, *args))


def _begin(target: Callable[..., None], *args: object) -> None:
    gc.freeze()  # or the collector looks through all that the server holds, and copies every page
    target(*args)


def nothing() -> None:
    """What most commands need before they begin."""


class Command:
    """`ckptq WORDS`, much like `subprocess.Popen`; `first` is called before it begins."""

    def __init__(
        self,
        *words: object,
        first: Callable[[], None] = nothing,
        encoding: str = "utf-8",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.folder = TemporaryDirectory()
        self.args = [str(word) for word in words]
        task = (self.args, self.folder.name, first, encoding, dict(environment))
        self.process = process(_main, *task)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """What it has printed, and said, when it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        with self.folder as folder:
            out, err = (Path(folder, name).read_bytes() for name in ("stdout", "stderr"))
        return out.decode(), err.decode()


def ckptq(*words: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """The same to its end."""
    command = Command(*words, **how)
    out, err = command.communicate()
    assert command.returncode is not None
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)


def _main(
    words: list[str],
    folder: str,
    first: Callable[[], None],
    encoding: str,
    environment: dict[str, str],
) -> None:
    from ckptq.__main__ import main

    os.environ |= environment
    for number, (name, errors) in enumerate(STREAMS.items(), start=1):
        with Path(folder, name).open("wb") as file:
            os.dup2(file.fileno(), number)
        stream = open(number, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    sys.argv = ["ckptq", *words]
    first()
    main()
