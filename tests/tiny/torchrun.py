"""Several processes at one command: as torchrun starts them, on one host or as if on two, or forked
with what it would have told them, in a fraction of the time."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny import ranks_session
from tiny.forked import server

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
    return _ended(_start(["--standalone", "--nproc-per-node", str(ranks)], words))


def forked(folder: Path, commands: Commands, ranks: int) -> list[list[Done]]:
    """Commands of ckptq in turn; of each, what every rank made of it."""
    _write(folder, commands)
    told = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    every = []
    for rank in range(ranks):
        own = told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        every.append(server.Process(target=ranks_session.perform, args=(folder, own)))
        every[-1].start()
    for process in every:
        process.join(SECONDS)
        if process.exitcode is None:
            for each in every:
                each.kill()
        assert process.exitcode == 0, "a rank hangs, or has a fault of its own"
    return _read(folder, len(commands), ranks)


def two_hosts(folder: Path, commands: Commands) -> list[list[Done]]:
    """The same in two torchrun groups of one process each."""
    _write(folder, commands)
    where = ["--master-addr", "127.0.0.1", "--master-port", _free_port()]
    each = ["--nnodes", "2", "--nproc-per-node", "1", *where, "--node-rank"]
    script = [ranks_session.__file__, folder]
    for ended in map(_ended, [_start([*each, host], script) for host in ("0", "1")]):
        assert ended.returncode == 0, ended.stderr
    return _read(folder, len(commands), 2)


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


def _start(how: Sequence[str], words: Sequence[str | Path]) -> subprocess.Popen[str]:
    whole = [sys.executable, "-m", "torch.distributed.run", *how, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(whole, stdout=pipe, stderr=pipe, text=True, env=environment)


def _ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends its processes
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
