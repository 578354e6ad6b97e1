"""A Python that has vLLM imported: each script that it is asked to run runs in a fork of it.

    VLLM_PYTHON server.py SOCKET

A request is JSON {"arguments": [script, ...], "stdin": text}, up to the end of what is sent; the
answer is {"code", "stdout", "stderr"}. One at a time: importing vLLM takes ten seconds, a fork
none, and none sees what another has changed. It runs until it is ended.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from typing import Any

os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
SECONDS = 300


def main() -> None:
    import vllm.model_executor.model_loader.utils  # noqa: F401  before the forks

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rw") as stream:
                text = stream.read()
                if text:  # nothing comes from who only looks whether it is there
                    json.dump(run(json.loads(text)), stream)


def run(request: dict[str, Any]) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        stdin.write(request["stdin"])
        stdin.seek(0)
        child = os.fork()
        if child == 0:
            for number, file in enumerate((stdin, stdout, stderr)):
                os.dup2(file.fileno(), number)
            os._exit(script(request["arguments"]))
        code = wait(child)
        for file in (stdout, stderr):
            file.seek(0)
        return {"code": code, "stdout": stdout.read(), "stderr": stderr.read()}


def script(arguments: list[str]) -> int:
    sys.argv[:] = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # what it was is told on its stderr
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def wait(child: int) -> int:
    """The exit code; one that takes too long is killed."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


if __name__ == "__main__":
    main()
