"""The command before anything is imported: Ctrl-C, and standard streams that the caller closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SLOW_IMPORT = """
import signal, sys, types
from analysis import entry

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":  # in the midst of the imports of the command line
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Slow())
entry.main()
"""


def test_control_c_during_imports_is_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", SLOW_IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; nothing was written.\n")


def test_closed_streams(tmp_path: Path) -> None:
    """No file of the run gets the number of a stream, and so nothing that is printed ends in it."""
    program = (
        "import os, sys; os.close(0); os.close(1); os.close(2); sys.stdin = sys.stdout = sys.stderr = None\n"
        "from analysis.run.signals import open_closed_streams; open_closed_streams()\n"
        "file = open('result', 'w'); print('to nobody'); os.system('echo and this; echo that >&2')\n"
        "file.write(str(file.fileno() > 2 and sys.stdin.read() == ''))"
    )
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
    assert (tmp_path / "result").read_text() == "True"
