"""The README installs what is imported; the wheel works where nothing else of this project is.

`make release-check` also installs the wheel, in clean environments, on every supported Python of this machine.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sources alone."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("curvature", "optimizers", "analysis", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), "."]
    subprocess.run(build, cwd=sources, check=True, capture_output=True)
    (built,) = folder.glob("torch_curvature-*.whl")
    return built


USE = """
import runpy, sys
import analysis, curvature, optimizers
assert all(sys.argv[1] in package.__file__ for package in (analysis, curvature, optimizers))
runpy.run_path("downstream.py", run_name="__main__")
assert analysis.load_task("digits-mlp").model is not None
optimizers.LearnedOptimizer(analysis.load_task("digits-mlp").model.parameters(), num_steps=10)
sys.argv = ["curvature", "--version"]
from analysis.entry import main
main()
"""


def assert_it_works(python: str | Path, place: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Typed code of a user, a bundled model and the command, by packages that lie in a place."""
    shutil.copy(ROOT / "tests/downstream.py", tmp_path / "downstream.py")
    command = [str(python), "-c", USE, str(place)]
    ran = subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("True")
    assert re.search(r"^version = \"(.*)\"$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1] in ran.stdout


def test_the_wheel_holds_what_users_need(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    for package in ("curvature", "optimizers", "analysis"):
        assert (tmp_path / "unpacked" / package / "py.typed").exists()
    place = tmp_path / "unpacked"
    assert_it_works(sys.executable, place, {"PYTHONPATH": str(place)}, tmp_path)


def supported() -> dict[str, str]:
    """The supported Pythons, and for each the oldest torch or, but for the first, the newest."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)", text)
    torch = re.search(r"\"torch>=([\d.]+)\"", text)
    oldest = re.search(r"requires-python = \">=(3\.\d+)\"", text)
    assert torch is not None
    assert oldest is not None
    assert pythons[0] == oldest[1]
    return {python: "torch" if i else f"torch=={torch[1]}.*" for i, python in enumerate(pythons)}


def pythons(version: str) -> Iterator[str]:
    """The interpreters of a version on this machine: on the path, and of pyenv."""
    named = shutil.which(f"python{version}")
    for path in (*((named,) if named else ()), *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))):
        asked = subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True)
        if asked.returncode == 0:
            yield path


@pytest.mark.skipif("RELEASE_CHECK" not in os.environ, reason="several minutes each: make release-check")
@pytest.mark.parametrize(("version", "torch"), supported().items())
def test_the_wheel_works_in_a_clean_environment(version: str, torch: str, wheel: Path, tmp_path: Path) -> None:
    """Installed by pip with its dependencies: a user's code runs, and passes mypy as strict as it gets."""
    found = next(pythons(version), None)
    if found is None:
        pytest.skip(f"there is no Python {version} on this machine")
    outside = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    subprocess.run([found, "-m", "venv", tmp_path / "venv"], check=True, env={**os.environ, **outside})
    python = tmp_path / "venv" / "bin" / "python"
    try:
        install = [python, "-m", "pip", "install", "-q", "--no-cache-dir", torch, f"{wheel}[tasks]", "mypy"]
        subprocess.run(install, check=True, cwd=tmp_path)
        assert_it_works(python, tmp_path / "venv", outside, tmp_path)
        check = [python, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "downstream.py"]
        typed = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **outside})
        assert typed.returncode == 0, typed.stdout
        which = [python, "-c", "import sys, torch; print('Python', sys.version.split()[0], 'torch', torch.__version__)"]
        subprocess.run(which, check=True)
    finally:
        shutil.rmtree(tmp_path / "venv")  # several GB


def test_the_citation_is_of_this_version() -> None:
    versions = [
        re.search(r"^version[:=] ?\"?([\d.]+)", (ROOT / name).read_text().replace(" =", "="), re.MULTILINE)
        for name in ("pyproject.toml", "CITATION.cff")
    ]
    assert versions[0] is not None
    assert versions[1] is not None
    assert versions[0][1] == versions[1][1]
