"""Errors of transformers, tokenizers, llm-compressor and model code, turned into ckptq errors."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from ckptq.errors import CkptqError, MachineError, SourceError

PANIC = "PanicException"
"""What a library in Rust raises where it would abort; it is no `Exception`."""

WEIGHTS_ALONE = "use a weights-only scheme (fp8-dynamic, w4a16) for this model"
"""What else can be done with a model that cannot be run."""

LONGEST = 300
"""Characters of a reason to show; some list every version of a library."""

OURS = str(Path(__file__).parents[1])


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Around one library call on a checkpoint's files: SourceError, "WHAT: the library's reason",
    on one line; MachineError if it ran out of memory.

    Catches every exception, and Rust panics: tokenizers raises bare `Exception`, config validators
    their own classes, and model code whatever an odd value leads to; the files are the cause.
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
    """Around code of a model's family: SourceError says where it failed and suggests another way.

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
            f"{_reason(error)}; try another version, or {WEIGHTS_ALONE}"
        ) from error


def _reason(error: BaseException) -> str:
    said, kind = shorten(str(error), LONGEST, placeholder=" ..."), type(error).__name__
    if not said:
        return kind
    # for a missing key the text is the key alone
    return f"{kind}: {said}" if isinstance(error, LookupError) else said


def _refuse_for_memory(what: str, error: BaseException) -> None:
    """torch reports memory errors by its own RuntimeError, or a plain one."""
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        raise MachineError(f"{what}: out of memory: {_reason(error)}") from error


def _is_ours(error: Exception) -> bool:
    """Whether ckptq itself raised it, in a place that was called from the guarded code.

    The first two frames are the guard and the function that it stands in.
    """
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [file for file in files[2:] if "/torch/" not in file]
    return bool(known) and known[-1].startswith(OURS)
