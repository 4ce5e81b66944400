"""Imports point one way: who may know what, held by parsing every import statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

UPWARD = {"optimizers", "analysis"}
USER_INTERFACE = {"matplotlib", "rich", "typer", "jinja2"}
MODELS = {"torch.nn", "curvature.objective", "curvature.operators", "curvature.linearize"}
LAYERS = {  # a folder or a module -> what nothing in it may import
    "curvature": UPWARD | USER_INTERFACE,
    "curvature/linalg": MODELS,
    "curvature/operators": {"curvature.linalg"},
    "curvature/results.py": {*MODELS, "curvature.linalg"},
    "curvature/solve_results.py": {*MODELS, "curvature.linalg"},
    "optimizers": {"analysis"} | USER_INTERFACE,
    "analysis/alignment_results.py": {*MODELS, "curvature.linalg"},
    "analysis/conditioning_results.py": {*MODELS, "curvature.linalg"},
    "analysis/critical_results.py": {*MODELS, "curvature.linalg"},
    "analysis/figures.py": {*MODELS, "curvature.linalg"},
    "analysis/figures_alignment.py": {*MODELS, "curvature.linalg"},
    "analysis/figures_conditioning.py": {*MODELS, "curvature.linalg"},
    "analysis/figures_critical_points.py": {*MODELS, "curvature.linalg"},
    "analysis/figures_landscape.py": {*MODELS, "curvature.linalg"},
    "analysis/figures_noise.py": {*MODELS, "curvature.linalg"},
    "analysis/figures_regularization.py": {*MODELS, "curvature.linalg"},
    "analysis/figures_sharpness.py": {*MODELS, "curvature.linalg"},
    "analysis/landscape_report.py": {*MODELS, "curvature.linalg"},
    "analysis/landscape_results.py": {*MODELS, "curvature.linalg"},
    "analysis/noise_results.py": {*MODELS, "curvature.linalg"},
    "analysis/page.py": {*MODELS, "curvature.linalg"},
    "analysis/regularization_results.py": {*MODELS, "curvature.linalg"},
    "analysis/report.py": {*MODELS, "curvature.linalg"},
    "analysis/sharpness_results.py": {*MODELS, "curvature.linalg"},
    "analysis/store.py": {*MODELS, "curvature.linalg"},
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


def violations(root: Path, layer: str, forbidden: set[str]) -> list[str]:
    """Return "file:line imports name" for every import in a layer that is forbidden there."""
    place = root / layer
    found = []
    for path in [place] if place.suffix == ".py" else sorted(place.rglob("*.py")):
        package = ".".join(path.relative_to(root).parent.parts)
        for line, name in imported_modules(ast.parse(path.read_text(encoding="utf-8")), package):
            if any(name == banned or name.startswith(banned + ".") for banned in forbidden):
                found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_imports_nothing_above_it(layer: str) -> None:
    assert violations(ROOT, layer, LAYERS[layer]) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_exists(layer: str) -> None:
    assert (ROOT / layer).exists(), f"{layer} has moved: a rule about a place that is not there holds nothing"


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import torch.nn", "torch.nn"),
        ("import torch.nn.functional as F", "torch.nn.functional"),
        ("from torch import nn", "torch.nn"),
        ("from torch.nn import Module", "torch.nn"),
        ("from curvature import objective", "curvature.objective"),
        ("from ..objective import Objective", "curvature.objective"),
        ("from .. import operators", "curvature.operators"),
        ("def later():\n    import curvature.operators.hessian", "curvature.operators.hessian"),
        ("if TYPE_CHECKING:\n    from curvature.linearize import Linearization", "curvature.linearize"),
    ],
)
def test_checker_catches_planted_import(tmp_path: Path, statement: str, name: str) -> None:
    folder = tmp_path / "curvature" / "linalg" / "deep"
    folder.mkdir(parents=True)
    (folder / "clean.py").write_text("import torch\nfrom torch import Tensor\nfrom curvature.linop import MatrixLike\n")
    (folder.parent / "planted.py").write_text(statement + "\n")
    found = violations(tmp_path, "curvature/linalg", LAYERS["curvature/linalg"])
    assert found
    assert all(entry.startswith("curvature/linalg/planted.py:") for entry in found)
    assert any(entry.endswith(f" imports {name}") for entry in found)
