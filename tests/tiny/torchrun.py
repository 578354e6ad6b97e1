"""Several processes at one command: as torchrun starts them, or forked with what it would have told
them, in a fraction of the time."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny import ranks_session
from tiny.forked import process

SECONDS = 120

Commands = Sequence[Sequence[str | Path]]


@dataclass(frozen=True)
class Done:
    """What one rank made of one command."""

    code: int
    stdout: str
    stderr: str


def torchrun(ranks: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A script and its arguments, in so many processes."""
    how = ["--standalone", "--nproc-per-node", str(ranks), *map(str, words)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *how],
        stdout=-1, stderr=-1, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends its processes
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def forked(
    folder: Path, commands: Commands, ranks: int, a_host: int | None = None
) -> list[list[Done]]:
    """Commands of ckptq in turn; of each, what every rank made of it."""
    _write(folder, commands)
    every = []
    for environment in environments(ranks, a_host):
        every.append(process(ranks_session.perform, folder, environment))
        every[-1].start()
    for rank in every:
        rank.join(SECONDS)
        if rank.exitcode is None:
            for each in every:
                each.kill()
        assert rank.exitcode == 0, "a rank hangs, or has a fault of its own"
    return _read(folder, len(commands), ranks)


def environments(ranks: int, a_host: int | None = None) -> list[dict[str, str]]:
    """What torchrun tells each of so many ranks, of which so many are on a host."""
    local = a_host or ranks
    told = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local), "OMP_NUM_THREADS": "1"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    return [told | {"RANK": str(n), "LOCAL_RANK": str(n % local)} for n in range(ranks)]


def _write(folder: Path, commands: Commands) -> None:
    folder.mkdir()
    (folder / "commands.json").write_text(json.dumps([list(map(str, each)) for each in commands]))


def _read(folder: Path, commands: int, ranks: int) -> list[list[Done]]:
    files = [[folder / f"{n}-{rank}.json" for rank in range(ranks)] for n in range(commands)]
    return [[Done(**json.loads(file.read_text())) for file in each] for each in files]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
