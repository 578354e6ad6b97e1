"""One run of the program in a process of its own, to which something happens on its way.

A step is a call that changes the disk, a read is one that reads a file under the trial's folder.
The process is forked from a server that has done its imports, as in `convert_killed`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_killed import STEPS
from tiny.forked import SECONDS, process, server

Call = Callable[..., Any]

READS = ("preadv", "pread", "read")

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class Accident:
    """What happens before step (or read) `at` of a run.

    "kill"; "EIO", "ENOSPC", "EDQUOT" of that one step; "full": ENOSPC of it and of all that write
    after it; "bad sector": EIO of a read; or the name of a function of `ordeal_others.MEANWHILE`.
    """

    what: str
    at: int
    call: str | None = None
    """The only call that counts; None: all do."""


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    said: str
    steps: int
    reads: int


def ckptq(
    words: list[str], folder: Path, accident: Accident | None = None, left_out: str | None = None
) -> Ended:
    """Run it to its end; `left_out` is a guard of ckptq's own that is taken away (`SABOTAGE`)."""
    said = folder / "said"
    steps, reads = server.Value("i", 0), server.Value("i", 0)
    run = (words, folder, accident, left_out, said, steps, reads)
    forked = process(_main, *run)
    forked.start()
    forked.join(SECONDS)
    assert forked.exitcode is not None, f"{words} hangs"
    return Ended(forked.exitcode, said.read_text(errors="replace"), steps.value, reads.value)


def _main(
    words: list[str],
    folder: Path,
    accident: Accident | None,
    left_out: str | None,
    said: Path,
    steps: Any,
    reads: Any,
) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["ckptq", *words]
    from ckptq.__main__ import main
    from ckptq.checkpoint import journal

    _journal_often()
    if left_out is not None:
        SABOTAGE[left_out]()
    before = _Before(folder, accident)
    for name in STEPS:
        setattr(os, name, before.each("step", steps, name, getattr(os, name)))
    journal.rename_new = before.each("step", steps, "rename_new", journal.rename_new)
    for name in READS:
        setattr(os, name, before.each("read", reads, name, getattr(os, name)))
    main()


def _journal_often() -> None:
    """Many entries of a journal in a run of a second."""
    import ckptq.calibrate.journal
    from ckptq.convert import output

    ckptq.calibrate.journal.SHARE_OF_TIME = float("inf")
    output.COMMIT_BYTES = 20_000


class _Before:
    """Calls of `os`, counted; the accident comes before its own."""

    def __init__(self, folder: Path, accident: Accident | None) -> None:
        self._folder = str(folder)
        self._accident = accident
        self._lock = threading.RLock()
        self._full = False
        self._quiet = False

    def each(self, kind: str, count: Any, name: str, call: Call) -> Call:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if self._counts(name) and any(self._within(arg) for arg in args[:2]):
                    count.value += 1
                    self._happen(kind, count.value)
                    if self._full and name in ("pwrite", "write", "copy_file_range", "ftruncate"):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return counted

    def _counts(self, name: str) -> bool:
        only = self._accident.call if self._accident is not None else None
        return not self._quiet and only in (None, name)

    def _happen(self, kind: str, number: int) -> None:
        if self._accident is None or number != self._accident.at:
            return
        what = self._accident.what
        if (kind == "read") != (what == "bad sector"):
            return
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "full":
            self._full = True
        elif what == "bad sector":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        elif what in ERRORS:
            raise OSError(ERRORS[what], os.strerror(ERRORS[what]))
        else:
            from ordeal_others import MEANWHILE

            self._quiet = True  # what others do is no step of the run
            MEANWHILE[what](Path(self._folder))
            self._quiet = False

    def _within(self, arg: object) -> bool:
        """Whether it is a path or an open file of the trial."""
        if isinstance(arg, int):
            try:
                arg = os.readlink(f"/proc/self/fd/{arg}")
            except OSError:
                return False
        return isinstance(arg, str | Path) and str(arg).startswith(self._folder + "/")


# Guards of ckptq's, each taken away to see that the trials miss it.


def _nothing_is_proved() -> None:
    import ckptq.calibrate.journal
    from ckptq.checkpoint import proof

    proof.proven = lambda *_: True
    ckptq.calibrate.journal.is_whole = Path.is_dir


def _any_source() -> None:
    from ckptq.checkpoint import identity, read, side_files

    for module in (identity, read, side_files):
        module.check_same = lambda *_: None


def _any_folder() -> None:
    from ckptq.checkpoint import partial

    partial.check_ours = lambda _: None


def _any_name() -> None:
    from ckptq.checkpoint import journal

    journal.rename_new = os.rename


def _any_output() -> None:
    from ckptq.checkpoint.journal import Journal

    Journal.prove_renamed = lambda *_: None


def _any_file() -> None:
    from ckptq.checkpoint.journal import Journal

    Journal._check_files = lambda *_: None


SABOTAGE: dict[str, Callable[[], None]] = {
    "units are proved": _nothing_is_proved,
    "the source is the same file": _any_source,
    "only a marked folder is a run's": _any_folder,
    "the output's name is new": _any_name,
    "what was renamed is proved": _any_output,
    "the output has no other files": _any_file,
}
