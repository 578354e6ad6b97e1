"""What transformers and tokenizers make of a checkpoint's files, or that they refuse them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

from ckptq.errors import CkptqError, SourceError

PANIC = "PanicException"
"""What a library in Rust raises where it would abort; it is no `Exception`."""

WEIGHTS_ALONE = "a scheme for weights alone (fp8-dynamic, w4a16) takes this model"
"""What else can be done with a model that cannot be run."""

LONGEST = 300
"""Characters of a reason that are told; some go on about every version of a library."""


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Around one call that only reads a checkpoint's files: SourceError, "WHAT: the library's
    reason", on one line.

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
        reason = shorten(str(error), LONGEST, placeholder=" ...") or type(error).__name__
        raise SourceError(f"{what}: {reason}") from error
