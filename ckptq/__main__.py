"""The program: `ckptq`, `python -m ckptq`. Turns errors and signals into a message and an exit
code."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from ckptq.cli import app
from ckptq.errors import CkptqError, MachineError
from ckptq.interrupts import Interrupted, ignore_signals, listen
from ckptq.show import console

RESUMED = ("quantize", "permute", "calibrate", "mend", "search")
"""The commands whose output has a journal; search keeps what it has measured."""


def main() -> NoReturn:
    """The entry point: every user error becomes one message and an exit code.

    Once that code is decided no signal changes it, however long the interpreter takes to end.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a result is shown on any terminal
    listen()
    try:
        code = _run()
    except Interrupted:
        ignore_signals()
        resumed = len(sys.argv) > 1 and sys.argv[1] in RESUMED
        kept = "rerun the same command to resume" if resumed else "nothing is kept"
        console.note(f"interrupted; {kept}")
        code = 130
    ignore_signals()
    sys.exit(code)


def _run() -> int | str | None:
    """What the command ends with."""
    try:
        app(prog_name="ckptq")
        return 0
    except SystemExit as end:
        return end.code
    except CkptqError as error:
        return console.complain(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return console.complain(MachineError("out of memory"))
    except OSError as error:
        return console.complain(MachineError(str(error)))


if __name__ == "__main__":
    main()
