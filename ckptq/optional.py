"""Packages that not every command needs."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

from ckptq.errors import UsageError


def require_llmcompressor(what: str) -> None:
    """UsageError where llm-compressor is not installed, or not with these versions of the others.

    Its log goes to what is stdout while it is imported, and that is for results.
    """
    try:
        with redirect_stdout(sys.stderr):
            import llmcompressor  # noqa: F401
    except ImportError as error:
        lacks = isinstance(error, ModuleNotFoundError) and error.name == "llmcompressor"
        found = "is not installed" if lacks else f"cannot be imported here: {error}"
        raise UsageError(
            f"llm-compressor runs {what}, and {found}; install it with "
            "`pip install 'ckptq[llmcompressor]'`"
        ) from error
