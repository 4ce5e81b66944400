"""Distances of SGD from its flows: orders known from theory, on the diabetes data, and a quadratic in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from analysis.implicit.backward_error import Orders, backward_error
from analysis.implicit.smoothness import kinks
from analysis.tasks.bundled import BUNDLED
from analysis.tasks.digits import load_digits
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


@pytest.mark.parametrize("num_batches", [2, 5])
def test_other_numbers_of_batches(num_batches: int) -> None:
    orders: Orders = "all" if num_batches == 2 else "reverse"
    found = backward_error(diabetes(num_batches), lrs=[0.00625, 0.0125], orders=orders, num_steps=2)
    assert float(found.slopes()[0]) > 2.6
    assert float(found.slopes("to_loss")[0]) < 2.3
    assert float(found.slopes("to_full")[0]) < 2.3
    assert not found.notes


def digits(num_batches: int) -> Objective:
    """The bundled network at random weights, on 40 digits: 870 parameters."""
    (x, y), _ = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUNDLED["digits-mlp"].make_model().double()
    batches = list(zip(x[:40].double().chunk(num_batches), y[:40].chunk(num_batches), strict=True))
    return Objective(model, nn.CrossEntropyLoss(), batches)


def test_descent_on_digits_mlp() -> None:
    step = backward_error(digits(1), lrs=[0.1, 0.2], num_steps=2)
    assert float(step.slopes("to_loss")[0]) == pytest.approx(2, abs=0.1)
    assert float(step.slopes()[0]) == pytest.approx(3, abs=0.15)


def test_reshuffling_on_digits_mlp() -> None:
    epoch, single = (
        backward_error(digits(3), lrs=[0.05, 0.1], orders=orders, num_steps=2) for orders in ("all", "single")
    )
    assert float(epoch.slopes()[0]) > 2.6
    assert float(epoch.slopes("to_loss")[0]) < 2.3
    assert float(epoch.slopes("to_full")[0]) < 2.3
    assert float(single.slopes()[0]) < 2.3


def test_kinks_are_named() -> None:
    objective = diabetes(1)
    assert isinstance(objective.model, nn.Sequential)
    objective.model[1] = nn.ReLU()
    (note,) = backward_error(objective, lrs=[0.1], num_steps=2).notes
    assert "Relu" in note
    assert "smooth" in note


class Functional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.functional.relu, ("Relu",)),
        (lambda z: nn.functional.relu_(z.sin()), ("Relu",)),
        (lambda z: nn.functional.max_pool1d(z, 2), ("MaxPool2DWithIndices",)),
        (lambda z: nn.functional.leaky_relu(z).abs(), ("Abs", "LeakyRelu")),
        (lambda z: z.clamp(min=0) + z.amax(1, keepdim=True), ("Amax", "Clamp")),
        (lambda z: nn.functional.gelu(z.tanh()) + nn.functional.softplus(z) + z.logsumexp(1, keepdim=True), ()),
    ],
)
def test_kinks_in_functions(function: Callable[[Tensor], Tensor], expected: tuple[str, ...]) -> None:
    model = Functional(function)
    objective = Objective(model, nn.MSELoss(), (torch.randn(3, 4), model(torch.zeros(3, 4)).detach()))
    assert kinks(objective) == expected


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
