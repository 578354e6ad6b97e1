"""SIGINT and SIGTERM: they end a command with a message, until its result is final."""

from __future__ import annotations

import signal
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """SIGINT or SIGTERM. No KeyboardInterrupt: with that one typer ends the program by itself,
    without a word."""


def listen() -> None:
    """From now on a signal raises Interrupted."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def ignore_signals() -> None:
    """From now on a signal changes nothing: the output is there, or the exit code is decided.

    Where nobody listened, in a program that calls ckptq, signals are that program's own.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(*_: object) -> NoReturn:
    raise Interrupted
