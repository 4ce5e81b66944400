"""Distances of SGD from its flows: orders known from theory, on the diabetes data, and a quadratic in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from analysis.backward_error import backward_error
from curvature import Objective
from curvature.errors import InputError


class HalfSquare(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().mean()


def diabetes(num_batches: int) -> Objective:
    """40 rows of 4 features, a tanh layer of 5, half the mean squared error: 31 parameters."""
    data, target = load_diabetes(return_X_y=True)
    x, y = torch.tensor(data[:40, :4]), torch.tensor(target[:40])[:, None]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    batches = list(zip(x.chunk(num_batches), y.chunk(num_batches), strict=True))
    return Objective(model, None, batches, forward=lambda f, b: HalfSquare()(f(b[0]), b[1]))


def test_one_step_of_descent() -> None:
    found = backward_error(diabetes(1), lrs=[0.025, 0.0125])
    assert float(found.slopes("to_loss")[-1]) == pytest.approx(2, abs=0.1)
    assert float(found.slopes()[-1]) == pytest.approx(3, abs=0.15)
    assert found.num_orders == 1
    assert found.fails_from is None
    assert torch.equal(found.to_full, found.to_modified)


def test_descent_to_a_fixed_time() -> None:
    """At T = 1.6 the global errors are of orders 1 and 2."""
    runs = [backward_error(diabetes(1), lrs=[lr], num_epochs=round(1.6 / lr), num_steps=2) for lr in (0.2, 0.1)]
    for which, order in (("to_loss", 1), ("to_modified", 2)):
        slope = math.log2(float(getattr(runs[0], which)) / float(getattr(runs[1], which)))
        assert slope == pytest.approx(order, abs=0.15), which


def test_mean_over_all_orders_follows_the_flow_with_the_noise_penalty() -> None:
    found = backward_error(diabetes(4), lrs=[0.0125, 0.025], orders="all", num_steps=4)
    assert found.num_orders == 24
    assert float(found.slopes()[0]) > 2.6
    assert float(found.slopes("to_loss")[0]) < 2.3
    assert float(found.slopes("to_full")[0]) < 2.3
    assert float(found.to_full[0]) > 5 * float(found.to_modified[0])
    assert bool((found.integrator_error < 1e-3 * found.to_modified).all())
    assert found.fails_from is None


def test_an_order_and_its_reverse_are_enough_and_one_order_is_not() -> None:
    pair, single = (
        backward_error(diabetes(4), lrs=[0.0125, 0.025], orders=o, num_steps=2) for o in ("reverse", "single")
    )
    assert float(pair.slopes()[0]) > 2.6
    assert float(single.slopes()[0]) < 2.3
    assert (pair.num_orders, single.num_orders) == (2, 1)


def test_a_quadratic_in_closed_form() -> None:
    """C = (w - 1)^2: a step multiplies the error by 1 - 2 lr, flows by exp(-2 lr) and exp(-2 lr (1 + lr))."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    one = torch.ones(1, 1, dtype=torch.float64)
    found = backward_error(Objective(model, nn.MSELoss(), (one, one)), lrs=[0.1], num_steps=20)
    assert float(found.to_loss) == pytest.approx(math.exp(-0.2) - 0.8, rel=1e-5)
    assert float(found.to_modified) == pytest.approx(math.exp(-0.22) - 0.8, rel=1e-4)
    assert float(found.moved) == pytest.approx(0.2)
    assert model.weight.item() == 0


def test_the_rate_from_which_on_theory_fails() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    one = torch.ones(1, 1, dtype=torch.float64)
    objective = Objective(model, nn.MSELoss(), (one, one))
    found = backward_error(objective, lrs=[0.4, 0.1, 2.0, 1.5], num_steps=8)
    steps, flow = 1 - 2 * found.lrs, (-2 * found.lrs).exp()
    bent = (-2 * found.lrs * (1 + found.lrs)).exp()
    nearer = (bent - steps).abs() < (flow - steps).abs()
    assert torch.equal(found.to_modified < found.to_loss, nearer)
    assert found.to_modified.isfinite().all()
    expected = None if bool(nearer[-1]) else float(found.lrs[~nearer][0])
    assert found.fails_from == expected


def test_a_run_that_overflows_fails() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    one = torch.ones(1, 1, dtype=torch.float64)
    objective = Objective(model, None, (one, one), forward=lambda f, b: f(b[0]).pow(4).exp().sum())
    found = backward_error(objective, lrs=[1e-3, 10.0], num_epochs=6)
    assert math.isinf(float(found.to_modified[-1]))
    assert found.fails_from == 10.0
    assert model.weight.item() == 1


def test_bad_arguments_are_refused() -> None:
    objective = diabetes(8)
    with pytest.raises(InputError, match="too many"):
        backward_error(objective, lrs=[0.1], orders="all")
    with pytest.raises(InputError, match="num_epochs"):
        backward_error(objective, lrs=[0.1], num_epochs=2)
    with pytest.raises(InputError, match="positive"):
        backward_error(objective, lrs=[])
    with pytest.raises(InputError, match="even"):
        backward_error(objective, lrs=[0.1], num_steps=3)
    single = Objective(nn.Linear(1, 1), nn.MSELoss(), (torch.ones(1, 1), torch.ones(1, 1)))
    with pytest.raises(InputError, match="double"):
        backward_error(single, lrs=[0.1])
