"""SIGINT and SIGTERM: they end a command with a message, until its result is final."""

from __future__ import annotations

import os
import signal
import sys
from threading import Timer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SOON = 0.05
"""Seconds until a signal that was dropped or came too early is sent again."""


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


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Modules in C drop what is raised while they import others, and go on without them (torch
    without numpy), or abort. So an import is let finish."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _send_again()
            return
        frame = frame.f_back
    raise Interrupted


def _raise_again(dropped: UnraisableHookArgs) -> None:
    """Python drops what is raised in a destructor, and would go on as if nobody had pressed
    Ctrl-C."""
    if issubclass(dropped.exc_type, Interrupted):
        _send_again()
    else:
        sys.__unraisablehook__(dropped)


def _send_again() -> None:
    Timer(SOON, os.kill, (os.getpid(), signal.SIGINT)).start()
