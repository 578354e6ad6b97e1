"""Asking the hub again where the network or the server fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ckptq.errors import CkptqError, MachineError

TRIES = 8
"""How often in a row nothing may arrive."""

WAIT = 0.25
"""Seconds before the second try; each further wait is twice as long: a minute in all."""

PASSING = (408, 409, 412, 429)
"""Answers of the 400s that another try may change: late, in conflict, too many."""

Answer = TypeVar("Answer")


def patiently(
    what: object, ask: Callable[[], Answer], refused: Callable[[Exception, int], CkptqError]
) -> Answer:
    """The answer. `refused` makes the error for one that asking again does not change, and its
    status; MachineError names `what` if nothing else comes in TRIES tries."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    seen = ""
    for tries in range(TRIES):
        try:
            return ask()
        except (HTTPError, OSError, RuntimeError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            if 400 <= status < 500 and status not in PASSING:
                raise refused(error, status) from error
            seen = said(error)
        time.sleep(WAIT * 2**tries)
    raise MachineError(f"{what}: the hub did not answer in {TRIES} tries: {seen}")


def said(error: BaseException) -> str:
    """The first line of an error, of its cause where its client only says what it was doing."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return said(error.__cause__)
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
