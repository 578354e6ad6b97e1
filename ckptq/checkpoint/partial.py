"""The folder in which a run works: marked before anything is in it, locked while the run lasts.

    OUT.partial/lock            the mark, and the lock on it
    OUT.partial/journal.jsonl   \\
    OUT.partial/checkpoint/      | what a run makes; its own modules say what is in there
    OUT.partial/calibration/     |
    OUT.partial/oneshot/         |
    OUT.partial/ranks/          /

Only a folder with the mark is written to and removed, and in it only what a run makes: a folder of
that name without the mark is refused, and so is a link.

The journal outlives the folder, so that a run that is killed while it cleans up can still prove
that OUT is its own: it is moved beside the folder, and removing it there is the last step of all.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from time import sleep

from ckptq.distributed.ranks import Ranks
from ckptq.distributed.records import JOURNAL
from ckptq.errors import MachineError, UsageError
from ckptq.files import UNFINISHED, machine_errors, sync_folder

LOCK = "lock"

MARK = b"ckptq is using this folder: rerun the same command to resume; it is removed at the end.\n"

OURS = re.compile(r"journal\.jsonl|checkpoint|calibration|oneshot|ranks")
"""What a run makes here, besides the lock."""

FIRST = b'{"run": {'
"""How a journal begins."""

ATTEMPTS = 100
"""How often the lock may disappear while it is taken, because another run ends; and how often
another host looks whether the folder is there."""

PAUSE = 0.1
"""Seconds between two looks."""


def check_apart(source: Path, out: Path) -> None:
    """UsageError for an output inside its source: it would be copied into itself."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies inside the source {source}; choose an output outside it")


def partial_of(out: Path) -> Path:
    """Where the run that makes `out` works."""
    return out.with_name(out.name + ".partial")


def last_of(partial: Path) -> Path:
    """Where the journal of a finished run is while its folder is removed."""
    return partial.with_name(f".{partial.name}{UNFINISHED}")


def claim(partial: Path, *, shared: bool = False) -> int:
    """Make the folder, mark it and lock it; returns the lock's descriptor, to be closed at the end.

    `shared` joins a run that has let others in. UsageError for an existing folder without the mark,
    or one that another run has locked.
    """
    for _ in range(ATTEMPTS):
        check_ours(partial)
        with machine_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
            held = _hold(partial, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if held is not None:
                _mark(partial, held)
                return held
    raise MachineError(f"{partial}: its lock keeps disappearing")


def claim_together(partial: Path, ranks: Ranks) -> int:
    """The same for a run of several processes: rank 0 claims it, the others join."""
    if ranks.world == 1:
        return claim(partial)
    held = ranks.agreed(lambda: let_in(claim(partial)) if ranks.leads else None)
    return ranks.agreed(lambda: held if held is not None else join(partial))


def let_in(lock: int) -> int:
    """Let other processes of the same run join. No other run gets the lock before the last ends."""
    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return lock


def join(partial: Path) -> int:
    """The lock of a process behind the one that has claimed the folder."""
    for _ in range(ATTEMPTS):
        if bears_mark(partial):
            return claim(partial, shared=True)
        sleep(PAUSE)  # another host may take a while to see it
    raise MachineError(
        f"{partial}: not on {gethostname()}; all processes of a run need one file system"
    )


def check_ours(partial: Path) -> None:
    """UsageError for anything there that was not made by a run."""
    if not os.path.lexists(partial):
        return
    if partial.is_symlink() or not partial.is_dir():
        raise _foreign(partial, "is a link" if partial.is_symlink() else "is a file")
    with machine_errors(partial):
        names = os.listdir(partial)
    mark = _read_mark(partial / LOCK)
    begun = names in ([], [LOCK]) and mark is not None and MARK.startswith(mark.rstrip(b"\0"))
    if mark != MARK and not begun:
        raise _foreign(partial, "not made by ckptq (its mark is missing)")
    for name in names:
        if OURS.fullmatch(name) and (partial / name).is_symlink():
            raise _foreign(partial / name, "is a link")


def bears_mark(partial: Path) -> bool:
    """Whether a run works, or has worked, in this folder."""
    return partial.is_dir() and _read_mark(partial / LOCK) == MARK


def discard(partial: Path) -> None:
    """Remove everything that a run has made except the lock; the journal first, because the rest
    means nothing without it."""
    with machine_errors(partial):
        (partial / JOURNAL).unlink(missing_ok=True)
        _empty(partial)


def remove(partial: Path) -> None:
    """Remove the folder of a finished run. The journal goes last: until then the same command can
    finish the removal. Files that no run has made stay, and so does the folder then."""
    last = last_of(partial)
    with machine_errors(partial):
        _empty(partial)
        if (partial / JOURNAL).exists():
            if os.path.lexists(last) and not _is_own(last):
                raise _foreign(last, "not a journal, but has the name that this run's needs")
            (partial / JOURNAL).rename(last)
        (partial / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            partial.rmdir()
        if _is_own(last):
            last.unlink(missing_ok=True)


def outlived(partial: Path) -> bool:
    """Whether the journal of a run is in its folder, or beside it because it was finished."""
    return (partial / JOURNAL).exists() or _is_own(last_of(partial))


def recover(partial: Path, *, finished: bool) -> None:
    """Put the journal of a run that was killed in `remove` back into its folder, which is claimed;
    if its output is gone, it is of no use and is removed."""
    last = last_of(partial)
    if not _is_own(last) or (partial / JOURNAL).exists():
        return
    with machine_errors(last):
        if finished:
            last.rename(partial / JOURNAL)
        else:
            last.unlink()


def _is_own(last: Path) -> bool:
    """Whether it is a journal: a file of that name may be anybody's."""
    if last.is_symlink() or not last.is_file():
        return False
    with machine_errors(last), last.open("rb") as file:
        return file.read(len(FIRST)) == FIRST


def _empty(partial: Path) -> None:
    """Remove the folders of runs, and the files that killed ones were writing beside them."""
    for path in made_by_runs(partial):
        shutil.rmtree(path)
    for file in partial.glob(f".*{UNFINISHED}"):
        file.unlink()


def made_by_runs(partial: Path) -> list[Path]:
    """The folders in it that runs have made."""
    return [p for p in sorted(partial.iterdir()) if OURS.fullmatch(p.name) and p.is_dir()]


def _read_mark(lock: Path) -> bytes | None:
    """The file's bytes, b"" if there is none; None if it is not a file."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    except OSError:
        return None
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return os.read(descriptor, len(MARK) + 1) if regular else None
    finally:
        os.close(descriptor)


def _hold(partial: Path, how: int) -> int | None:
    """The lock, taken; None if it was removed in the meantime."""
    lock = partial / LOCK
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(lock)):
            return descriptor
    except FileNotFoundError:
        pass
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(f"{partial}: another run is writing this output") from error
    os.close(descriptor)
    return None


def _mark(partial: Path, lock: int) -> None:
    """Write the mark to disk before anything else is in the folder."""
    if os.pread(lock, len(MARK) + 1, 0) != MARK:
        os.pwrite(lock, MARK, 0)
        os.ftruncate(lock, len(MARK))
        os.fsync(lock)
        sync_folder(partial)
        sync_folder(partial.parent)


def _foreign(path: Path, why: str) -> UsageError:
    return UsageError(f"{path}: {why}; move it away, or choose another output")
