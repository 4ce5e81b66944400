"""Output that never costs a measurement: to terminals that lack characters, and to pipes that were closed."""

from __future__ import annotations

import os
import re
import sys
from typing import IO, Any

from analysis.show import wording

__all__ = ["Output", "print_results"]


class Output:
    """Standard output or error, whatever becomes of it.

    Characters that it cannot show are replaced; once it cannot be written to, what is meant for it is dropped and
    `failure` says why.

    Args:
        stderr: of the two, that one.
    """

    def __init__(self, *, stderr: bool) -> None:
        self._name = "stderr" if stderr else "stdout"
        self.failure: OSError | ValueError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def _stream(self) -> IO[str] | None:
        stream: IO[str] | None = getattr(sys, self._name)  # looked up each time: it may be replaced
        return stream

    @property
    def encoding(self) -> str:
        """The encoding, UTF-8 where none is known."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text, as far as it can be shown."""
        stream = self._stream
        if stream is not None and self.failure is None:
            try:
                stream.write(self._shown(text))
            except (OSError, ValueError) as error:  # ValueError: it is closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        stream = self._stream
        if stream is not None and self.failure is None:
            try:
                stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _shown(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            known = _RAISED.sub(lambda m: "^" + m[0].translate(_LOWERED), text).translate(_PLAIN)
            return known.encode(self.encoding, "backslashreplace").decode(self.encoding)
        return text

    def _give_up(self, error: OSError | ValueError) -> None:
        self.failure = error
        stream = self._stream
        try:  # what is still buffered would fail again at the end of the process
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno() if stream is not None else -1)
            os.close(null)
        except (OSError, ValueError):  # a stream without a descriptor
            pass


_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_PLAIN = str.maketrans(
    {
        wording.MINUS: "-",
        wording.TIMES: "x",
        "±": "+/-",
        "·": "*",
        "λ": "lambda",
        "₂": "2",
        "ℓ": "l",
        "…": "...",
        "≤": "<=",
        "≥": ">=",
        "→": "->",
        **dict(zip(wording.BARS, "_.:-=+*#", strict=True)),
        wording.THIN: " ",
        "\N{NO-BREAK SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ",
    }
)


def print_results(text: str) -> OSError | ValueError | None:
    """Print a line of results on standard output, and return why that failed."""
    output = Output(stderr=False)
    output.write(text + "\n")
    output.flush()
    return output.failure
