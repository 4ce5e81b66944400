"""The README installs what is imported."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
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


def test_the_wheel_holds_what_users_need(tmp_path: Path) -> None:
    """Built from the sources alone, unpacked elsewhere: typed code of a user, a bundled model and the command run."""
    sources = tmp_path / "sources"
    for name in ("curvature", "optimizers", "analysis", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        sources.mkdir(exist_ok=True)
        copy(ROOT / name, sources / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=sources, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("torch_curvature-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    for package in ("curvature", "optimizers", "analysis"):
        assert (tmp_path / "unpacked" / package / "py.typed").exists()
    shutil.copy(ROOT / "tests/downstream.py", tmp_path / "downstream.py")
    code = """
import runpy, sys
import analysis, curvature, optimizers
assert all("unpacked" in package.__file__ for package in (analysis, curvature, optimizers))
runpy.run_path("downstream.py", run_name="__main__")
assert analysis.load_task("digits-mlp").model is not None
optimizers.LearnedOptimizer(analysis.load_task("digits-mlp").model.parameters(), num_steps=10)
sys.argv = ["curvature", "--version"]
from analysis.entry import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("True")
    assert re.search(r"^version = \"(.*)\"$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1] in ran.stdout


def test_the_citation_is_of_this_version() -> None:
    versions = [
        re.search(r"^version[:=] ?\"?([\d.]+)", (ROOT / name).read_text().replace(" =", "="), re.MULTILINE)
        for name in ("pyproject.toml", "CITATION.cff")
    ]
    assert versions[0] is not None
    assert versions[1] is not None
    assert versions[0][1] == versions[1][1]
