"""Print the tests of what changed: of the rooms of files that differ from the last commit, or that it changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALWAYS = ("tests/test_imports.py",)


def changed() -> list[Path]:
    """Return the files that are not committed; if there are none, those of the last commit."""

    def listed(*command: str) -> list[Path]:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
        return [Path(line) for line in done.stdout.splitlines()]

    now = listed("diff", "--name-only", "HEAD") + listed("ls-files", "--others", "--exclude-standard")
    return now or listed("diff", "--name-only", "HEAD~1", "HEAD")


def tests_of(path: Path) -> list[Path]:
    """Return the tests of a file: of its room, or those named for a module outside rooms; a test is its own."""
    if path.parts[0] == "tests":
        return [path] if path.name.startswith("test_") else []
    room = Path("tests", *path.parts[:2])
    if (ROOT / room).is_dir():
        deeper = Path("tests", *path.parts[:3])
        return [deeper if (ROOT / deeper).is_dir() else room]
    return [p.relative_to(ROOT) for p in (ROOT / room.parent).glob(f"test_{path.stem}.py")]


if __name__ == "__main__":
    found = {test for path in changed() if path.suffix == ".py" for test in tests_of(path) if (ROOT / test).exists()}
    print(*ALWAYS, *sorted(map(str, found)))
