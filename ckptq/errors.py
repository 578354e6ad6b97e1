"""What can go wrong for a user, each kind with the exit code that scripts and CI read.

Messages name the file and the tensor, what was found and what was expected. A mistake of our own is
an `assert` or an ordinary exception, never one of these.
"""


class CkptqError(Exception):
    """Base of everything that is shown to a user as one message, without a traceback."""

    exit_code = 1


class FoundWrong(CkptqError):
    """A check ran and the answer is no (verify, evaluate thresholds)."""

    exit_code = 1


class UsageError(CkptqError):
    """The command line, the recipe or the plan asks for something impossible or unsupported."""

    exit_code = 2


class PlanError(UsageError):
    """The recipe does not fit this checkpoint; found before any byte moved."""


class SourceError(CkptqError):
    """A file on disk does not match itself, its index or its config."""

    exit_code = 3


class MachineError(CkptqError):
    """The machine lacks something: disk, memory, device."""

    exit_code = 4


class ProcessLost(MachineError):
    """Another process of the same run has ended while this one waited for it."""


class ToldElsewhere(CkptqError):
    """Another process of the same run says what went wrong; this one only ends with its code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code
