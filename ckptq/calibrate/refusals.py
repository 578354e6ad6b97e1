"""What transformers and tokenizers make of a checkpoint's files, or that they refuse them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckptq.errors import CkptqError, SourceError


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Around one call that only reads a checkpoint's files: SourceError, "WHAT: the first line of
    the library's reason".

    Every exception is meant. tokenizers raises bare `Exception`, validators of configs classes of
    their own, and code of families whatever an odd value leads to; the files are the cause of all.
    """
    try:
        yield
    except (CkptqError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        said = reason[0] if reason else ""
        raise SourceError(f"{what}: {said or type(error).__name__}") from error
