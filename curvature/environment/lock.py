"""One lock for what an evaluation sets for the whole process, or in a model that threads share.

Flags of torch, random states, parameters that are shifted, buffers that are exchanged.
"""

from __future__ import annotations

import os
import threading

__all__ = ["one_at_a_time"]

one_at_a_time = threading.RLock()
"""Re-entrant; free in a forked process, where the threads that may have held it do not exist."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=one_at_a_time._at_fork_reinit)  # type: ignore[attr-defined]  # as threading does
