"""SIGINT and SIGTERM: they end a command with a message, until its result is final."""

from __future__ import annotations

import os
import signal
import sys
from threading import Timer
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SOON = 0.05
"""Seconds until a signal that was dropped is sent again."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM. No KeyboardInterrupt: with that one typer ends the program by itself,
    without a word."""


def listen() -> None:
    """From now on a signal raises Interrupted."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    sys.unraisablehook = _raise_again


def ignore_signals() -> None:
    """From now on a signal changes nothing: the output is there, or the exit code is decided.

    Where nobody listened, in a program that calls ckptq, signals are that program's own.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(*_: object) -> NoReturn:
    raise Interrupted


def _raise_again(dropped: UnraisableHookArgs) -> None:
    """Python drops what is raised in a destructor, and would go on as if nobody had pressed
    Ctrl-C."""
    if issubclass(dropped.exc_type, Interrupted):
        Timer(SOON, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)
