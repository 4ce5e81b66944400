"""Where the command `curvature` begins: it sees to Ctrl-C and closed streams before the imports, which take seconds."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

__all__ = ["main", "open_closed_streams"]


def main() -> None:
    """Import the command line and run it; Ctrl-C on the way there is a line on stderr and exit code 130."""
    open_closed_streams()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as in background jobs
        from analysis import cli
    else:
        signal.signal(signal.SIGINT, _stop)  # an exception in the middle of an import may come out as another one
        from analysis import cli

        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def open_closed_streams() -> None:
    """Point standard streams that the caller closed at nothing, so that no file of ours gets their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _stop(number: int, frame: object) -> NoReturn:
    del number, frame
    os.write(2, b"stopped; nothing was written.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
