"""Programs in another Python, without this one's modules; their errors are quoted."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ckptq.errors import MachineError

LAST_LINES = 12
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Defaults for vLLM if the environment has none: on a CPU, a cache of 1 GiB, which
leaves room for others, and threads that are not bound to cores."""

CAUSE = re.compile(r"^(?:.*[\]:] )?((?:\w+\.)*\w+(?:Error|Exception): .+)$", re.MULTILINE)
"""The end of a traceback, after any logger's prefix."""


def run_python(
    command: Sequence[str], *, folder: Path | None = None, timeout: float | None = None
) -> None:
    """Run to the end, in `folder`, with the environment except PYTHONPATH.

    MachineError if it does not start, takes longer than `timeout` seconds, or fails; with
    its first error, which is the cause if several processes fail together.
    """
    environment = VLLM | {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except OSError as error:
        raise MachineError(f"{command[0]}: cannot be run: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"{command[0]}: no answer in {timeout:.0f} s") from error
    if done.returncode:
        said = f"{' '.join(command[:3])} ended with {done.returncode}"
        raise MachineError(f"{said}:\n{last_words(done.stdout, done.stderr)}")


def last_words(stdout: str, stderr: str) -> str:
    """The first error that a program printed, in one line; without one, the end of its output."""
    found = CAUSE.search(stdout + "\n" + stderr)
    if found is not None:
        return found[1]
    return "\n".join((stderr.strip() or stdout.strip()).splitlines()[-LAST_LINES:])
