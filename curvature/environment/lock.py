"""One lock for what an evaluation sets for the whole process, or in a model that threads share.

Flags of torch, random states, parameters that are shifted, buffers that are exchanged.
"""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType

__all__ = ["one_at_a_time"]


class _Lock(contextlib.AbstractContextManager[None]):
    """Re-entrant; new in a forked process, where the threads that may have held it do not exist."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


one_at_a_time = _Lock()
