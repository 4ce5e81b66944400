"""Diagonals and Kronecker factors against BackPACK, which computes them by rules of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvature import GGNOperator, HessianOperator, Objective
from curvature.layerwise import exact_diagonal, kronecker_factors
from tests.checks import assert_close

backpack = pytest.importorskip("backpack")
extensions = pytest.importorskip("backpack.extensions")

ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.Sigmoid)
X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = {
    nn.CrossEntropyLoss: torch.tensor([0, 1, 2, 1, 0, 2, 2]),
    nn.MSELoss: torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
}


@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_diagonals(activation: type[nn.Module], loss: type[nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3)).double()
    y = TARGETS[loss]
    objective = Objective(model, loss(), list(zip(X.split((4, 2, 1)), y.split((4, 2, 1)), strict=True)))
    ours = [operator(objective).to_dense().diagonal() for operator in (HessianOperator, GGNOperator)]
    for kind, diagonal in zip(("hessian", "ggn"), ours, strict=True):
        assert_close(exact_diagonal(objective, kind).value, diagonal)  # type: ignore[arg-type]

    extended, criterion = backpack.extend(model), backpack.extend(loss())
    with backpack.backpack(extensions.DiagHessian(), extensions.DiagGGNExact()):
        criterion(extended(X.clone().requires_grad_()), y).backward()  # hooks on inputs without gradient warn
    for name, diagonal in zip(("diag_h", "diag_ggn_exact"), ours, strict=True):
        assert_close(diagonal, torch.cat([getattr(p, name).reshape(-1) for p in model.parameters()]))


@pytest.mark.parametrize("kind", ["kflr", "kfra"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kronecker_factors(activation: type[nn.Module], kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3)).double()
    y = TARGETS[nn.CrossEntropyLoss]
    factors = kronecker_factors(Objective(model, nn.CrossEntropyLoss(), (X, y)), kind)  # type: ignore[arg-type]
    extended, criterion = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack({"kflr": extensions.KFLR, "kfra": extensions.KFRA}[kind]()):
        criterion(extended(X.clone().requires_grad_()), y).backward()
    for name, found in factors.layers.items():
        B, A = getattr(model.get_submodule(name).weight, kind)
        assert_close(found.B, B)
        assert_close(found.A[:-1, :-1], A)
