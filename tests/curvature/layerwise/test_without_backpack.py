"""Without BackPACK, or without a package that it needs, autograd takes over, and results say why."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis.inspection.diagonal import layer_diagonals
from curvature import Objective
from curvature.errors import InputError
from curvature.layerwise import backpack_per_example, backpack_refusal, exact_diagonal, kronecker_factors
from tests.curvature.layerwise.exact_cases import ggn

ROOT = Path(__file__).parents[3]
DISTRIBUTIONS = {  # import -> what brings it, where the names differ
    "backpack": "backpack-for-pytorch",
    "markupsafe": "jinja2",
    "mpl_toolkits": "matplotlib",
    "sklearn": "scikit-learn",
    "typing_extensions": "torch",
}
OPTIONAL = {"transformers", "safetensors"}  # imported for users of them, with an error that names them


def test_nothing_imports_it_before_it_is_used() -> None:
    program = "import sys, analysis.cli, analysis.inspection.plan, optimizers\n"
    program += "sys.exit('backpack' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.parametrize("missing", ["backpack", "einops", "unfoldNd"])
def test_autograd_takes_over(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("backpack", missing) or name.startswith("curvature.layerwise.backpack_"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]  # which is how imports are blocked
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    model, loss = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), nn.MSELoss()
    objective = Objective(model, loss, (x, y))
    told = f"cannot be imported (ModuleNotFoundError: import of {missing} halted; None in sys.modules); pip install"
    assert told in (backpack_refusal(objective) or "")
    found = exact_diagonal(objective)
    assert told in found.reason
    torch.testing.assert_close(found.values, ggn(model, loss, x, y).diagonal())
    assert kronecker_factors(objective).route == "hooks"
    assert told in layer_diagonals(objective, generator=torch.Generator().manual_seed(0)).how
    calls: list[Callable[[], Any]] = [
        lambda: exact_diagonal(objective, route="backpack"),
        lambda: kronecker_factors(objective, "kfra"),
        lambda: backpack_per_example(objective),
    ]
    for call in calls:
        with pytest.raises(InputError, match=re.escape(told)):
            call()


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
    needs = {re.split(r"[ ;<>=!~(]", need)[0] for need in importlib.metadata.requires("backpack-for-pytorch") or []}
    of_backpack = {need for need in needs if need.lower() in ("einops", "unfoldnd", "torch", "torchvision")}
    assert {"einops", "torchvision"} <= of_backpack  # else what the README says of them is out of date
    assert of_backpack - {"torchvision"} <= named
