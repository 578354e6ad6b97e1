"""The program: `ckptq`, `python -m ckptq`. What ends a command early becomes words and a code."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from ckptq import console
from ckptq.cli import app
from ckptq.errors import CkptqError, MachineError


class Interrupted(BaseException):
    """SIGINT or SIGTERM. No KeyboardInterrupt: with that one typer ends the program by itself,
    without a word."""


def main() -> NoReturn:
    """The entry point: every error a user can mend becomes one message and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except CkptqError as error:
        sys.exit(console.complain(error))
    except Interrupted:
        console.note("interrupted; the same command goes on where this one stopped")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        sys.exit(console.complain(MachineError(str(error))))
    sys.exit(0)


def _interrupt(*_: object) -> NoReturn:
    raise Interrupted


if __name__ == "__main__":
    main()
