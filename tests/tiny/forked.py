"""ckptq in processes of their own that are forked from a server which has done the imports: a
command begins after milliseconds instead of seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

SECONDS = 60

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        *("ckptq.__main__", "ckptq.convert.pipeline", "ckptq.gptq.layers", "ckptq.evaluate.run"),
        *("ckptq.verify.one_pass", "transformers.models.llama.modeling_llama"),
        *("transformers.models.mixtral.modeling_mixtral", "compressed_tensors.quantization"),
    ]
)


def nothing() -> None:
    """What most commands need before they begin."""


class Command:
    """As `subprocess.Popen`: `ckptq WORDS` with output into pipes; `first` is called before."""

    def __init__(
        self, *words: object, first: Callable[[], None] = nothing, encoding: str = "utf-8"
    ) -> None:
        self.folder = TemporaryDirectory()
        self.args = [str(word) for word in words]
        task = (self.args, self.folder.name, first, encoding)
        self.process = server.Process(target=_main, args=task)
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


def ckptq(*words: object, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """The same to its end."""
    command = Command(*words, encoding=encoding)
    out, err = command.communicate()
    return subprocess.CompletedProcess(command.args, command.returncode or 0, out, err)


def _main(words: list[str], folder: str, first: Callable[[], None], encoding: str) -> None:
    from ckptq.__main__ import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        with Path(folder, name).open("wb") as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, "w", encoding=encoding, closefd=False))  # noqa: SIM115
    sys.argv = ["ckptq", *words]
    first()
    main()
