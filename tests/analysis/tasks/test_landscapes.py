"""The landscapes have the shape that they state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from analysis.cli import app
from analysis.tasks import load_task
from analysis.tasks.landscapes import LANDSCAPES
from curvature import HessianOperator, Objective


def objective_of(name: str) -> Objective:
    return load_task(name).to(dtype=torch.float64).objective()


def at(objective: Objective, *values: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return loss, gradient and Hessian eigenvalues at a point."""
    with torch.no_grad():
        for p, value in zip(objective.model.parameters(), values, strict=True):
            p.copy_(value)
    loss, gradient = objective.loss_and_gradient()
    return float(loss), gradient, torch.linalg.eigvalsh(HessianOperator(objective).to_dense())


@pytest.mark.parametrize("name", LANDSCAPES)
def test_its_stated_minimum_is_one(name: str) -> None:
    places = {
        "quadratic": [torch.zeros(1, 10)],
        "rosenbrock": [torch.ones(2)],
        "monkey-saddle": [torch.tensor([-3.0, 0.0])],
    }
    task = load_task(name)
    if name == "deep-linear":
        inputs, targets = task.train_data
        product = torch.linalg.lstsq(inputs.double(), targets.double()).solution.T
        U, s, Vh = torch.linalg.svd(product)
        places[name] = [torch.diag(s.pow(1 / 3)) @ Vh, torch.diag(s.pow(1 / 3)), U @ torch.diag(s.pow(1 / 3))]
    loss, gradient, eigenvalues = at(objective_of(name), *places[name])
    assert loss == pytest.approx(task.metadata["lowest_loss"], abs=1e-10)
    assert float(gradient.norm()) < 1e-5
    assert float(eigenvalues[0]) > -1e-5
    assert load_task(name).model is not load_task(name).model


def test_the_quadratic_has_its_spectrum_and_is_turned() -> None:
    objective = objective_of("quadratic")
    H = HessianOperator(objective).to_dense()
    torch.testing.assert_close(torch.linalg.eigvalsh(H), torch.logspace(0, 2, 10).double(), rtol=1e-5, atol=0)
    assert float(H.diagonal().max() / H.diagonal().min()) < 20
    assert float(objective.loss()) == pytest.approx(float(torch.logspace(0, 2, 10).double().sum() / 2), rel=1e-5)


def test_rosenbrock_is_the_textbooks() -> None:
    loss, gradient, _ = at(objective_of("rosenbrock"), torch.tensor([-1.2, 1.0]))
    assert loss == pytest.approx(24.2, rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor([-215.6, -88.0]).double(), rtol=1e-5, atol=1e-4)


def test_the_saddle_has_no_curvature_and_gradient_descent_goes_there_first() -> None:
    objective = objective_of("monkey-saddle")
    loss, gradient, eigenvalues = at(objective, torch.zeros(2))
    assert (loss, float(gradient.norm()), float(eigenvalues.abs().max())) == (0, 0, 0)
    task = load_task("monkey-saddle")
    point = next(task.model.parameters())
    optimizer, near = torch.optim.SGD([point], lr=0.05), []
    for _ in range(400):
        optimizer.zero_grad()
        task.model(task.train_data[0]).mean().backward()
        optimizer.step()
        near.append(float(point.detach().norm()))
    assert min(near) < 0.1
    assert near[-1] == pytest.approx(3, abs=1e-3)


def test_the_deep_linear_network_learns_one_singular_value_after_the_other() -> None:
    """Plateaus lie where the largest are learned: half the sum of squares of the rest (Saxe et al. 2014)."""
    task = load_task("deep-linear").to(dtype=torch.float64)
    optimizer, losses = torch.optim.SGD(task.model.parameters(), lr=0.02), []
    for _ in range(3000):
        optimizer.zero_grad()
        assert task.loss is not None
        loss = task.loss(task.model(task.train_data[0]), task.train_data[1])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for rest in ((2.0, 1.0, 0.5), (1.0, 0.5), (0.5,)):
        plateau = sum(s * s for s in rest) / 2
        assert sum(abs(value - plateau) < 0.05 * plateau for value in losses) > 10, plateau
    assert losses[-1] < 1e-6
    assert isinstance(task.model, nn.Sequential)


def test_a_command_takes_them(tmp_path: Path) -> None:
    """A saddle without curvature, and a loss that is no likelihood, are the hardest to say something about."""
    found = CliRunner().invoke(app, ["inspect", "monkey-saddle", "--out", str(tmp_path), "--json", "--seed", "0"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)
