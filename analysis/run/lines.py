"""Files that grow by a line at a time and survive whatever stops the process: a line is there whole, or it is not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["append_line", "read_lines", "write_lines"]


def append_line(path: Path, line: str) -> None:
    """Add a line, whole or not at all; it is with the system when this returns.

    Raises:
        OSError: if it cannot be written.
    """
    content = (line + "\n").encode()
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        written = 0
        try:
            written = file.write(content)
        finally:
            if written != len(content):
                file.truncate(before)
    if written != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_lines(path: Path, *, repair: bool) -> list[str]:
    """Return the whole lines of a file; one that was cut off while it was written is as if it had never been.

    Args:
        path: of the file.
        repair: also take what was cut off out of the file, so that lines can be added.

    Raises:
        OSError: if it cannot be read, or repaired.
        UnicodeDecodeError: if it holds something else.
    """
    content = path.read_bytes()
    length = content.rfind(b"\n") + 1
    if repair and length != len(content):
        os.truncate(path, length)
    return content[:length].decode().splitlines()


def write_lines(path: Path, lines: list[str]) -> None:
    """Replace a file by these lines, in one step.

    Raises:
        OSError: if it cannot be written.
    """
    half = path.with_name(f".{path.name}")
    half.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    half.replace(path)
