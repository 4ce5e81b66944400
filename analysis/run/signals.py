"""What a process gets from outside: Ctrl-C and requests to end, at the right moment, and streams that are closed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Terminated", "ends_as_interrupt", "open_closed_streams", "uninterrupted"]


class Terminated(KeyboardInterrupt):
    """Someone asked the process to end: SIGTERM, or SIGHUP of a terminal that was closed."""


def ends_as_interrupt() -> None:
    """Let SIGTERM and SIGHUP end this process the way Ctrl-C does, with everything put in order first."""

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Terminated

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it, and that stands
            signal.signal(number, end)


class Stop:
    """Whether someone asked to stop meanwhile."""

    asked = False


@contextmanager
def uninterrupted() -> Iterator[Stop]:
    """Put off Ctrl-C in the context, whose value says whether it came; a second one interrupts at once.

    Elsewhere than in the main thread, where Python handles no signals, it does nothing.
    """
    stop, before = Stop(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            before(number, frame)
        stop.asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def open_closed_streams() -> None:
    """Point standard streams that the caller closed at nothing, so that no file of ours gets their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
