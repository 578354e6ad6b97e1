"""What transformers, tokenizers, llm-compressor and the code of families make of a checkpoint, or
that they refuse it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from ckptq.errors import CkptqError, MachineError, SourceError

PANIC = "PanicException"
"""What a library in Rust raises where it would abort; it is no `Exception`."""

WEIGHTS_ALONE = "a scheme for weights alone (fp8-dynamic, w4a16) takes this model"
"""What else can be done with a model that cannot be run."""

LONGEST = 300
"""Characters of a reason that are told; some go on about every version of a library."""

OURS = str(Path(__file__).parents[1])


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Around one call that only hands over a checkpoint's files: SourceError, "WHAT: the library's
    reason", on one line; MachineError where it had too little memory.

    Every exception is meant, and a panic. tokenizers raises bare `Exception`, validators of configs
    classes of their own, and code of families whatever an odd value leads to; the files are the
    cause of all.
    """
    try:
        yield
    except (CkptqError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        _refuse_for_memory(what, error)
        raise SourceError(f"{what}: {_reason(error)}") from error


@contextmanager
def family_code(label: str, what: str) -> Iterator[None]:
    """Around code of a model's family: SourceError with where it failed and what else there is.

    `label` is the checkpoint, `what` the class and the place: "JambaForCausalLM in layer 3". What
    ckptq raises inside of it (taps, recorders, loaders) passes.
    """
    try:
        yield
    except (CkptqError, MemoryError, OSError):
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        _refuse_for_memory(f"{label}: {what}", error)
        import transformers

        raise SourceError(
            f"{label}: transformers {transformers.__version__} cannot run {what}: "
            f"{_reason(error)}; another version may, and {WEIGHTS_ALONE}"
        ) from error


def _reason(error: BaseException) -> str:
    said, kind = shorten(str(error), LONGEST, placeholder=" ..."), type(error).__name__
    if not said:
        return kind
    # of a key that is missing they say the key alone
    return f"{kind}: {said}" if isinstance(error, LookupError) else said


def _refuse_for_memory(what: str, error: BaseException) -> None:
    """torch tells of memory by a RuntimeError of its own, or a plain one."""
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        raise MachineError(f"{what}: too little memory: {_reason(error)}") from error


def _is_ours(error: Exception) -> bool:
    """Whether ckptq itself raised it, in a place that was called from the guarded code.

    The first two frames are the guard and the function that it stands in.
    """
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [file for file in files[2:] if "/torch/" not in file]
    return bool(known) and known[-1].startswith(OURS)
