"""Where the command `curvature` begins: it sees to Ctrl-C and closed streams before the imports, which take seconds."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from analysis.run.signals import open_closed_streams

__all__ = ["main"]


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


def _stop(number: int, frame: object) -> NoReturn:
    del number, frame
    os.write(2, b"stopped; nothing was written.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
