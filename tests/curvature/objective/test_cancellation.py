"""Gradients in float32 of closely fitted data: what rounding leaves of them is said, and is what float64 shows."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from torch import Tensor, nn

from curvature import Objective

LOSSES = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]), reduction="sum"),
    nn.BCEWithLogitsLoss(),
    nn.MSELoss(),
]
Batches = list[tuple[Tensor, Tensor]]


def network(scale: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        list(model.parameters())[2].mul_(scale)
    return model


def fitted(loss: nn.Module, closely: bool) -> tuple[nn.Sequential, Batches]:
    """Return a model and data that it fits: so closely that float32 keeps two digits of its gradient, or loosely."""
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    if isinstance(loss, nn.MSELoss):
        model = network()
        z = model(x).detach()
        y = z + (1e-6 if closely else 1e-2) * torch.randn_like(z)
    else:
        model = network(100.0 if closely else 20.0)
        z = model(x).detach()
        of_class = isinstance(loss, nn.CrossEntropyLoss)
        margin = z.topk(2).values.diff(dim=1).abs()[:, 0] if of_class else z.abs().amin(1)
        sure = margin > (14.0 if closely else 0.0)
        x, z = x[sure], z[sure]
        y = z.argmax(1) if of_class else (z > 0).float()
    return model, [(x[:9], y[:9]), (x[9:], y[9:])]


def said(objective: Objective) -> list[float]:
    found = [re.search(r"rounding to float32 is (\S+) of the gradient", note) for note in objective.notes]
    return [float(match[1]) for match in found if match]


def in_double(model: nn.Module, loss: nn.Module, data: Batches) -> Objective:
    wide = [(x.double(), y.double() if y.is_floating_point() else y) for x, y in data]
    return Objective(copy.deepcopy(model).double(), copy.deepcopy(loss).double(), wide)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__ + loss.reduction)
def test_what_is_said_is_what_float64_shows(loss: nn.Module) -> None:
    model, data = fitted(loss, closely=True)
    objective, wide = Objective(model, loss, data), in_double(model, loss, data)
    g = wide.gradient()
    error = float((objective.gradient() - g).norm() / g.norm())
    assert error > 3e-3
    (share,) = said(objective)
    assert share / 4 < error < 4 * share
    assert said(wide) == []


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__ + loss.reduction)
def test_nothing_is_said_of_digits_that_are_there(loss: nn.Module) -> None:
    model, data = fitted(loss, closely=False)
    objective, g = Objective(model, loss, data), in_double(model, loss, data).gradient()
    assert float((objective.gradient() - g).norm() / g.norm()) < 1e-3
    assert said(objective) == []


def test_a_batch_that_is_not_fitted_has_the_digits() -> None:
    loss = LOSSES[0]
    model, data = fitted(loss, closely=True)
    x, y = data[0]
    objective = Objective(model, loss, [*data, (x, (y + 1) % 4)])
    objective.gradient()
    assert said(objective) == []


def test_it_is_said_of_the_present_point() -> None:
    loss = LOSSES[0]
    model, data = fitted(loss, closely=True)
    objective = Objective(model, loss, data)
    objective.gradient()
    assert said(objective)
    with torch.no_grad():
        list(model.parameters())[2].mul_(0.01)
    objective.gradient()
    assert said(objective) == []


def test_for_a_function_with_settings_in_float32_it_is_estimated() -> None:
    model, data = fitted(LOSSES[0], closely=True)
    loss = functools.partial(nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    objective = Objective(model, loss, data)
    objective.gradient()
    assert said(objective)


def bias(outputs: Tensor) -> nn.Module:
    """Return a model whose outputs are its parameters."""

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(outputs.clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.z * x

    return Outputs()


@pytest.mark.parametrize("kind", ["probabilities", "smoothing", "binary"])
def test_targets_that_are_no_classes_are_fitted_where_the_loss_is_large(kind: str) -> None:
    torch.manual_seed(0)
    soft = torch.softmax(torch.randn(6, 3), 1)
    y, z, loss = soft, soft.log(), nn.CrossEntropyLoss()
    if kind == "smoothing":
        y, loss = torch.arange(6) % 3, nn.CrossEntropyLoss(label_smoothing=0.15)
        z = (0.05 + 0.85 * nn.functional.one_hot(y, 3)).log()
    elif kind == "binary":
        z, loss = soft.logit(), nn.BCEWithLogitsLoss()
    for apart, expected in ((0.0, 1), (0.1, 0)):
        objective = Objective(bias(z + apart * torch.randn(6, 3)), loss, (torch.ones(6, 1), y))
        assert float(objective.loss()) > 0.3
        assert len(said(objective)) == expected


@pytest.mark.parametrize("margin", [20.0, 40.0, 120.0])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=["classes", "binary"])
def test_a_gradient_of_which_no_digit_is_left_is_said_to_be_rounding(loss: nn.Module, margin: float) -> None:
    y = torch.ones(4, 2) if isinstance(loss, nn.BCEWithLogitsLoss) else torch.zeros(4, dtype=torch.long)
    z = torch.full((4, 2), margin)
    if isinstance(loss, nn.CrossEntropyLoss):
        z[:, 1] = 0.0
    objective = Objective(bias(z), loss, (torch.ones(4, 1), y))
    objective.gradient()
    (share,) = said(objective)
    assert 0.3 < share <= 1.0
    assert ("float64 holds no more" in str(objective.notes)) == (margin > 20)


def test_residuals_that_are_zero_are_no_rounding() -> None:
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    objective = Objective(bias(z), nn.MSELoss(), (torch.ones(6, 1), z))
    assert float(objective.gradient().norm()) == 0
    assert said(objective) == []
