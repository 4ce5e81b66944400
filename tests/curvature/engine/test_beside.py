"""Losses that depend on parameters beside the outputs: right where that is defined, refused where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import EmpiricalFisherOperator, FisherOperator, GGNOperator, HessianOperator, MCFisherOperator, Objective
from curvature.errors import InputError
from curvature.layerwise import exact_diagonal, kronecker_factors
from curvature.per_example import gradient_norms, per_example_gradients
from tests.checks import assert_close
from tests.references import dense_hessian

N = 8
Made = tuple[nn.Module, Any, Callable[[nn.Module, Any], tuple[Tensor, Tensor]]]


def net(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=g, dtype=torch.float64), torch.randn(N, 3, generator=g, dtype=torch.float64)


def soft_labels() -> Made:
    return net(), nn.CrossEntropyLoss(), lambda model, batch: ((z := model(batch[0])), (2 * z).softmax(1))


def of_outputs() -> Made:
    return net(), nn.MSELoss(), lambda model, batch: ((z := model(batch[0])), z.tanh() / 2)


def of_parameters() -> Made:
    return net(), nn.MSELoss(), lambda model, batch: (model(batch[0]), batch[1] * model[0].weight.sum())


def halves() -> Made:
    return net(6), nn.MSELoss(), lambda model, batch: model(batch[0]).chunk(2, 1)


def penalised() -> Made:
    model = net()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(z, t) + 0.3 * sum(p.square().sum() for p in model.parameters())

    return model, loss, lambda model, batch: (model(batch[0]), batch[1])


BESIDE = [soft_labels, of_outputs, of_parameters, halves, penalised]


def objective(made: Made, **settings: Any) -> Objective:
    model, loss, forward = made
    return Objective(model, loss, data(), forward=forward, **settings)


@pytest.mark.parametrize("make", BESIDE)
@pytest.mark.parametrize("keep_graphs", [True, False])
def test_hessian_and_gradient_have_all_of_the_loss(make: Callable[[], Made], keep_graphs: bool) -> None:
    model, loss, forward = made = make()
    params = list(model.parameters())
    H = dense_hessian(lambda: loss(*forward(model, data())), params)
    g = torch.autograd.grad(loss(*forward(model, data())), params)
    found = objective(made, keep_graphs=keep_graphs)
    assert_close(HessianOperator(found).to_dense(), H, 1e-11)
    assert_close(found.gradient(), torch.cat([part.reshape(-1) for part in g]), 1e-12)
    assert_close(exact_diagonal(found, "hessian").value, H.diagonal(), 1e-11)


@pytest.mark.parametrize("make", BESIDE)
def test_matrices_of_the_outputs_alone_are_refused(make: Callable[[], Made]) -> None:
    found = objective(make())
    v = torch.ones(found.num_params, dtype=torch.float64)
    asked: list[Callable[[], Any]] = [
        lambda: GGNOperator(found) @ v,
        lambda: EmpiricalFisherOperator(found) @ v,
        lambda: exact_diagonal(found, "ggn"),
        lambda: kronecker_factors(found, kind="kflr"),
    ]
    if make is not penalised:  # of a loss whose distribution is known
        asked += [
            lambda: FisherOperator(found) @ v,
            lambda: MCFisherOperator(found, generator=0) @ v,
            lambda: exact_diagonal(found, "fisher-mc", generator=0),
            lambda: kronecker_factors(found, kind="kfac", generator=0),
        ]
    for ask in asked:
        with pytest.raises(InputError, match=r"the targets depend on the parameters|beside the outputs"):
            ask()


def test_gradients_of_examples_have_targets_that_the_outputs_make() -> None:
    model, loss, forward = made = soft_labels()
    params = list(model.parameters())
    rows = []
    for i in range(N):
        g = torch.autograd.grad(loss(*forward(model, [part[i : i + 1] for part in data()])), params)
        rows.append(torch.cat([part.reshape(-1) for part in g]))
    found = torch.cat([part for _, part in per_example_gradients(objective(made))])
    assert_close(found, torch.stack(rows), 1e-11)
    squares = gradient_norms(objective(made)).squared_norms
    assert squares is not None
    assert_close(squares, torch.stack(rows).square().sum(1), 1e-11)


def test_what_is_held_fixed_serves_everywhere() -> None:
    """Targets that are detached, and data that record gradients themselves."""
    model, loss, forward = soft_labels()
    x, y = data()

    def detached(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        z, t = forward(model, batch)
        return z, t.detach()

    fixed = forward(model, (x, y))[1].detach()
    plain = GGNOperator(Objective(model, loss, (x, fixed))).to_dense()
    assert_close(GGNOperator(objective((model, loss, detached))).to_dense(), plain, 1e-12)
    leaf = Objective(model, loss, (x, fixed.clone().requires_grad_()))
    assert_close(GGNOperator(leaf).to_dense(), plain, 1e-12)
    assert_close(exact_diagonal(leaf).value, plain.diagonal(), 1e-12)
