"""Execute the notebooks: from NN_name.py, in percent format, make NN_name.ipynb with its outputs beside it.

python notebooks/execute.py            all of them
python notebooks/execute.py 01         those whose names start so
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def execute(source: Path) -> Path:
    """Run one notebook from top to bottom and write it, without what changes from machine to machine."""
    notebook = jupytext.read(source)
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(FOLDER.parent)}}
    ).execute()
    notebook.metadata = nbformat.from_dict(KEPT)
    for number, cell in enumerate(notebook.cells):
        cell.metadata.clear()
        cell.id = f"cell-{number:02d}"
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


if __name__ == "__main__":
    prefix = sys.argv[1] if len(sys.argv) > 1 else ""
    for path in sorted(FOLDER.glob(f"{prefix}*.py")):
        if path.name[0].isdigit():
            print(f"{path.name} ...", flush=True)
            print(f"  -> {execute(path).name}")
