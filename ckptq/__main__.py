"""The program: `ckptq`, `python -m ckptq`. What ends a command early becomes words and a code."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from ckptq import console
from ckptq.cli import app
from ckptq.errors import CkptqError, MachineError

RESUMED = ("quantize", "permute", "calibrate")
"""The commands whose output has a journal."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM. No KeyboardInterrupt: with that one typer ends the program by itself,
    without a word."""


def main() -> NoReturn:
    """The entry point: every error a user can mend becomes one message and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app(prog_name="ckptq")
    except CkptqError as error:
        sys.exit(console.complain(error))
    except Interrupted:
        resumed = len(sys.argv) > 1 and sys.argv[1] in RESUMED
        kept = "the same command goes on where this one stopped" if resumed else "nothing is kept"
        console.note(f"interrupted; {kept}")
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
