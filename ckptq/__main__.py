"""The program: `ckptq`, `python -m ckptq`. Turns errors and signals into a message and an exit
code."""

from __future__ import annotations

import atexit
import io
import os
import sys
from typing import NoReturn

from ckptq.cli import app
from ckptq.distributed.ranks import met, started
from ckptq.errors import CkptqError, MachineError, ProcessLost, UsageError
from ckptq.interrupts import Interrupted, ignore_signals, listen
from ckptq.show import console

RESUMED = ("quantize", "permute", "calibrate", "mend", "search")
"""The commands whose output has a journal; search keeps what it has measured."""


def main() -> NoReturn:
    """The entry point: every user error becomes one message and an exit code.

    Once that code is decided no signal changes it, however long the interpreter takes to end.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a result is shown on any terminal
    listen()
    try:
        code = _run()
    except Interrupted:
        ignore_signals()
        also = ", perhaps because another process of the run has ended"
        console.note(f"interrupted{also if started().world > 1 else ''}; {_kept()}")
        code = 130
    ignore_signals()
    sys.exit(code)


def program() -> NoReturn:
    """`main`, and the end of the process.

    After the exit handlers the interpreter would take seconds to look for cycles in everything that
    torch and transformers have made, so the process ends before that.
    """
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            raise end from None  # the interpreter says what was not written
        atexit._run_exitfuncs()
        os._exit(end.code)


def _open_closed_streams() -> None:
    """Daemons may start a command without standard streams. The files that it opens must not get
    their numbers: a warning would be written into a shard."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115


def _kept() -> str:
    resumed = len(sys.argv) > 1 and sys.argv[1] in RESUMED
    return "rerun the same command to resume" if resumed else "nothing is kept"


def _run() -> int | str | None:
    """What the command ends with. Of several ranks the first prints; of the others, only errors are
    seen."""
    try:
        with console.quiet(not started().leads):
            app(prog_name="ckptq")
        return 0
    except SystemExit as end:
        return end.code
    except ProcessLost as error:
        return console.complain(ProcessLost(f"{error}; {_kept()}"))
    except CkptqError as error:
        if isinstance(error, UsageError) and not started().leads and not met():
            return error.exit_code  # the first says the same
        return console.complain(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return console.complain(MachineError("out of memory"))
    except OSError as error:
        return console.complain(MachineError(str(error)))


if __name__ == "__main__":
    program()
