"""Critical sharpness against a scan of the loss along the update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from analysis.training.critical_sharpness import critical_sharpness, search_critical_step
from curvature import Objective
from curvature.errors import InputError


def network() -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        data = (torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64))
    return model, data


def scanned(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], u: torch.Tensor, far: float) -> float:
    """Return the first a at which the loss is back where it started, from 200 points and a line between two."""
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    grid = torch.linspace(0, far, 200).tolist()
    losses = []
    with torch.no_grad():
        for a in grid:
            nn.utils.vector_to_parameters(start + a * u, model.parameters())
            losses.append(float(nn.functional.mse_loss(model(data[0]), data[1])))
        nn.utils.vector_to_parameters(start, model.parameters())
    i = next(i for i in range(1, 200) if losses[i] > losses[0])
    before, after = losses[i - 1] - losses[0], losses[i] - losses[0]
    return grid[i - 1] + (grid[i] - grid[i - 1]) * -before / (after - before)


@pytest.mark.parametrize("lr", [1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["gradient", "sign"])
def test_it_agrees_with_a_scan_in_six_losses(lr: float, kind: str) -> None:
    model, data = network()
    objective = Objective(model, nn.MSELoss(), data)
    g = objective.gradient()
    u = -lr * (g if kind == "gradient" else 0.1 * g.sign())
    found = critical_sharpness(objective, u, lr=lr)
    root = scanned(model, data, u, far=4 * found.step / lr)
    assert found.num_losses <= 6
    if lr == 1e-3:  # too far to grow to in six steps, and said so
        assert found.status.name in ("OK", "NO_BRACKET")
    if found.status.ok:
        assert found.step == pytest.approx(root * lr, rel=0.05)
        assert found.lower <= found.step <= found.upper
        assert found.value == 2 / found.step
    else:
        assert found.step < root * lr
        assert math.isinf(found.upper)


def test_an_ascent_and_a_bracket_that_is_not_found_are_told() -> None:
    model, data = network()
    objective = Objective(model, nn.MSELoss(), data)
    g = objective.gradient()
    up = critical_sharpness(objective, g, lr=1.0)
    assert (up.status.name, up.num_losses, math.isnan(up.value)) == ("ASCENT", 0, True)
    short = critical_sharpness(objective, -1e-9 * g, lr=1e-9)
    assert short.status.name == "NO_BRACKET"
    assert short.value == 2 / short.step
    assert math.isinf(short.upper)


def test_a_loss_that_only_rounds_or_overflows_is_told() -> None:
    settings = {"lr": 1.0, "max_losses": 6, "rtol": 0.02, "eps": 1e-7}
    flat = search_critical_step(lambda a: 1.0 + (1e-8 if a > 1 else 0.0), 1.0, -1e-8, **settings)
    assert (flat.status.name, math.isnan(flat.value)) == ("ROUNDING", True)
    wall = search_critical_step(lambda a: 1 - a if a < 0.01 else math.nan, 1.0, -1.0, **settings)
    assert wall.status.name == "NO_BRACKET"
    assert wall.lower < 0.01 <= wall.upper


def test_a_root_that_secants_of_the_bracket_approach_from_one_side_is_found() -> None:
    """phi(a) = -0.044 + 0.0106 a^(1/2) rises steeply and flattens; from 28 on, its root is at (0.044 / 0.0106)^2."""
    root = (0.044 / 0.0106) ** 2
    found = search_critical_step(
        lambda a: 1.7 + a * (-0.044 + 0.0106 * math.sqrt(a)),
        1.7,
        -0.044,
        lr=1.0,
        max_losses=6,
        rtol=0.02,
        eps=1e-7,
        first=28.0,
    )
    assert found.status.name == "OK"
    assert found.step == pytest.approx(root, rel=0.005)
    assert found.lower < root < found.upper < 1.05 * found.lower


def test_a_root_at_an_end_of_the_bracket_ends_the_search() -> None:
    """The secant's root is the end itself to rounding, as where a training has converged; it went on for ever."""

    def stops(a: float) -> float:
        seen.append(a)
        return 1e-20 * a

    seen: list[float] = []
    found = search_critical_step(stops, 0.0, -1.0, lr=0.1, max_losses=6, rtol=0.01, eps=1e-16)
    assert math.isclose(found.step, 0.1)
    assert seen == [1.0]


def test_the_same_update_on_another_loss() -> None:
    """On a quadratic a w^2 / 2 + b w the critical rate along u is -2 (a w + b) / (a u), times lr."""
    w = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(w.weight, 1.0)
    data = (torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))

    def quadratic(a: float, b: float) -> Objective:
        return Objective(w, None, [data], forward=lambda model, _: (a * model.weight**2 / 2 + b * model.weight).sum())

    u = torch.tensor([-0.3], dtype=torch.float64)
    for a, b in ((3.0, 0.0), (1.0, 1.0)):
        found = critical_sharpness(quadratic(a, b), u, lr=0.1)
        assert found.step == pytest.approx(2 * (a + b) / (a * 0.3) * 0.1, rel=1e-6)
    forgetting = critical_sharpness(quadratic(1.0, -2.0), u, lr=0.1)
    assert forgetting.status.name == "ASCENT"


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": 1.0, "max_losses": 2}, {"lr": 1.0, "rtol": 1.0}])
def test_arguments_out_of_range(settings: dict[str, float]) -> None:
    model, data = network()
    objective = Objective(model, nn.MSELoss(), data)
    with pytest.raises(InputError, match="lr must be positive"):
        critical_sharpness(objective, objective.gradient(), **settings)
    with pytest.raises(InputError, match="shape"):
        critical_sharpness(objective, objective.gradient()[:-1], lr=1.0)
