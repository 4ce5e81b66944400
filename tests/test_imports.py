"""Imports point one way: who may know what, held by parsing every import statement of every file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("curvature", "optimizers", "analysis")
MAX_LINES = 400
LONGER: set[str] = set()  # to be split

USER_INTERFACE = {"matplotlib", "rich", "typer", "jinja2"}
MODELS = {"torch.nn", "curvature.objective", "curvature.operators", "curvature.engine", "curvature.linalg"}
RULES = {  # places, as globs -> what nothing there may import; a new file cannot escape them
    "curvature/**/*.py": {"optimizers", "analysis"} | USER_INTERFACE,
    "curvature/linalg/**/*.py": MODELS - {"curvature.linalg"},
    "curvature/operators/**/*.py": {"curvature.linalg"},
    "curvature/results/**/*.py": MODELS,
    "optimizers/**/*.py": {"analysis"} | USER_INTERFACE,
    "analysis/**/figures*.py": MODELS,
    "analysis/**/results.py": MODELS,
    "analysis/**/report.py": MODELS,
    "analysis/show/**/*.py": {*MODELS, "analysis.run", "analysis.tasks"},
    "analysis/records/**/*.py": MODELS,
}

# Rooms from the top down: a room imports from those below it only.
ROOMS = {
    "curvature": (
        "adapters solve spectra layerwise per_example operators objective engine losses data linalg fingerprints linop "
        "sharding autograd parameters results environment arguments generators errors"
    ),
    "curvature.linalg": "systems low_rank stochastic krylov base",
    "optimizers": "checks learned without_backprop first_order kronecker newton diagonal shared",
    "analysis": (
        "entry cli registry race compare generalization inspection landscape sharpness conditioning critical "
        "integrations learning_rate training implicit noise alignment run tasks show records"
    ),
}


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of each import of a module of `package`; `from a import b` counts as a and as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def imports_of(path: Path, root: Path) -> list[tuple[int, str]]:
    package = ".".join(path.relative_to(root).parent.parts)
    return list(imported_modules(ast.parse(path.read_text(encoding="utf-8")), package))


def violations(root: Path, places: str, forbidden: set[str]) -> list[str]:
    """Return "file:line imports name" for every import that is forbidden there."""
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in sorted(root.glob(places))
        for line, name in imports_of(path, root)
        if any(name == banned or name.startswith(banned + ".") for banned in forbidden)
    ]


def room(name: str, within: str) -> str | None:
    """Return the room of a package that a module lies in; None for those outside and for the package itself."""
    parts, depth = name.split("."), within.count(".") + 1
    return parts[depth] if name.startswith(within + ".") and len(parts) > depth else None


@pytest.mark.parametrize("places", RULES)
def test_imports_nothing_above_it(places: str) -> None:
    assert violations(ROOT, places, RULES[places]) == []
    assert list(ROOT.glob(places)), f"{places} has moved: a rule about a place that is not there holds nothing"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_from_below(package: str) -> None:
    order, folder = ROOMS[package].split(), ROOT / package.replace(".", "/")
    there = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    assert there == set(order), "every room has its place in the order"
    found = []
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(ROOT).with_suffix("")
        here = room(".".join(relative.parts), package)
        for line, name in imports_of(path, ROOT):
            other = room(name, package)
            if here in order and other in order and order.index(here) > order.index(other):
                found.append(f"{relative}:{line} imports {name}")
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package: str) -> None:
    """No module imports itself through others; imports for annotations and inside functions count."""
    modules = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    edges = {name: _modules_imported(path, modules) - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def _modules_imported(path: Path, modules: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            base, *members = [name for _, name in imported_modules(ast.Module([node], []), "")]
            known = {name for name in members if name in modules}
            found |= known or {name for name in (base,) if name in modules}
    return found


def test_one_room_speaks_of_cuda() -> None:
    found = set()
    for path in [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else [name]
            if {"cuda", "is_cuda"} & {name for name in names if isinstance(name, str)}:
                found.add(str(path.relative_to(ROOT)))
    assert found == {f"curvature/environment/{name}.py" for name in ("device", "precision")}


def test_files_are_short() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for k in PACKAGES for p in (ROOT / k).rglob("*.py")}
    assert {str(p.relative_to(ROOT)) for p, n in lengths.items() if n > MAX_LINES} == LONGER


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import torch.nn", "torch.nn"),
        ("import torch.nn.functional as F", "torch.nn.functional"),
        ("from torch import nn", "torch.nn"),
        ("from torch.nn import Module", "torch.nn"),
        ("from curvature import objective", "curvature.objective"),
        ("from ...objective import Objective", "curvature.objective"),
        ("from ... import operators", "curvature.operators"),
        ("def later():\n    import curvature.operators.hessian", "curvature.operators.hessian"),
        ("if TYPE_CHECKING:\n    from curvature.engine.linearize import Linearization", "curvature.engine.linearize"),
    ],
)
def test_checker_catches_planted_import(tmp_path: Path, statement: str, name: str) -> None:
    folder = tmp_path / "curvature" / "linalg" / "deep"
    folder.mkdir(parents=True)
    (folder / "clean.py").write_text("import torch\nfrom torch import Tensor\nfrom curvature.linop import MatrixLike\n")
    (folder / "planted.py").write_text(statement + "\n")
    places = "curvature/linalg/**/*.py"
    found = violations(tmp_path, places, RULES[places])
    assert found
    assert all(entry.startswith("curvature/linalg/deep/planted.py:") for entry in found)
    assert any(entry.endswith(f" imports {name}") for entry in found)


def test_one_place_of_the_lower_packages_reaches_up_by_name() -> None:
    """`Result.plot` asks `analysis` for the figure; no other string may hide an import from the rules."""
    reaching = [
        path.relative_to(ROOT).as_posix()
        for package in ("curvature", "optimizers")
        for path in sorted((ROOT / package).rglob("*.py"))
        if re.search(r"""import(_module|__)\(\s*["'](analysis|optimizers)""", path.read_text(encoding="utf-8"))
    ]
    assert reaching == ["curvature/results/record.py"]
