"""The README installs what is imported."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {  # import -> what brings it, where the names differ
    "markupsafe": "jinja2",
    "mpl_toolkits": "matplotlib",
    "sklearn": "scikit-learn",
    "typing_extensions": "torch",
}
OPTIONAL = {"transformers", "safetensors", "pandas"}  # imported for users of them, with an error that names them


def test_the_readme_installs_what_is_imported() -> None:
    """Of a CPU torch, without the dependencies that pip would take along."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\$ pip install ([^.'\[\n]*?)(?: \.)?(?:  +#.*)?$", readme, flags=re.MULTILINE)
    named = {word for line in lines for word in line.split() if not word.startswith("-")} | {"torch"}
    imported: set[str] = set()
    for package in ("curvature", "optimizers", "analysis"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.partition(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"curvature", "optimizers", "analysis"} - OPTIONAL
    assert {DISTRIBUTIONS.get(name, name) for name in outside} <= named
