"""The edge of stability: thresholds on quadratics, phases of made-up runs, and the regime itself on digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from analysis.training.edge import edge_of_stability
from analysis.training.results import EdgeOfStability, Phase, TrainingReading, TrainingRecord
from analysis.training.tracker import CurvatureTracker
from curvature import Objective, optimizer_divisor, stability_limit
from curvature.errors import InputError
from curvature.parameters import ParameterSpace
from optimizers import AdaHessian

SGD, F64 = torch.optim.SGD, torch.float64


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 2.0),
        ({"momentum": 0.9}, 3.8),
        ({"momentum": 0.9, "dampening": 0.5}, 7.6),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
        ({"dampening": 0.5}, 2.0),
    ],
)
def test_steps_of_sgd_shrink_below_the_limit_and_grow_above_it(settings: dict[str, Any], limit: float) -> None:
    """On w^2 / 2, whose curvature is 1."""
    grown = []
    for lr in (0.98 * limit, 1.02 * limit):
        w = nn.Parameter(torch.ones(1, dtype=F64))
        optimizer = SGD([w], lr=lr, **settings)
        assert stability_limit(optimizer) == pytest.approx(limit)
        for _ in range(1000):
            w.grad = w.detach().clone()
            optimizer.step()
        grown.append(abs(float(w.detach())) > 1)
    assert grown == [False, True]


@pytest.mark.parametrize(("momentum", "limit"), [(0.0, 2.0), (0.9, 3.8)])
def test_rmsprop_with_its_average_held(momentum: float, limit: float) -> None:
    for factor in (0.98, 1.02):
        w = nn.Parameter(torch.ones(1, dtype=F64))
        optimizer = torch.optim.RMSprop([w], lr=0.1, alpha=1.0, eps=0.5 * factor / 0.98, momentum=momentum)
        assert stability_limit(optimizer) == pytest.approx(limit)
        optimizer.param_groups[0]["lr"] = factor * limit * 0.5 * factor / 0.98  # P is eps, for v stays 0
        for _ in range(1000):
            w.grad = w.detach().clone()
            optimizer.step()
        assert (abs(float(w.detach())) > 1) == (factor > 1)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_adam_with_its_average_held(beta1: float) -> None:
    """With v held at 0 and eps = 1 the steps are lr times the average of gradients."""
    limit = (2 + 2 * beta1) / (1 - beta1)
    for factor in (0.98, 1.02):
        w = nn.Parameter(torch.ones(1, dtype=F64))
        optimizer = torch.optim.Adam([w], lr=factor * limit, betas=(beta1, 1 - 1e-12), eps=1.0)
        assert stability_limit(optimizer) == pytest.approx(limit)
        w.grad = torch.zeros_like(w)
        optimizer.step()
        state, sizes = optimizer.state[w], []
        for _ in range(1500):
            w.grad = w.detach().clone()
            optimizer.step()
            state["exp_avg_sq"].zero_()
            sizes.append(abs(float(w.detach())))
        P = optimizer_divisor(optimizer, ParameterSpace({"w": w}))
        assert float(P) == pytest.approx(1, abs=1e-5)
        assert (max(sizes[-50:]) > max(sizes[700:750])) == (factor > 1)  # after the young averages


def test_adahessian_and_refusals() -> None:
    w = nn.Parameter(torch.ones(2))
    assert stability_limit(AdaHessian([w], lr=0.1, betas=(0.8, 0.99))) == pytest.approx(18)
    assert stability_limit(torch.optim.Adagrad([w])) == 2
    with pytest.raises(InputError, match="maximizes"):
        stability_limit(SGD([w], lr=0.1, maximize=True))
    with pytest.raises(InputError, match="Rprop is not known"):
        stability_limit(torch.optim.Rprop([w]))


def test_rows_that_were_never_seen_are_left_out() -> None:
    w = nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = torch.optim.Adam([w], lr=0.1)
    w.grad = torch.tensor([1.0, 0.0, 2.0], dtype=F64)
    optimizer.step()
    space = ParameterSpace({"w": w})
    kept, left = optimizer_divisor(optimizer, space), optimizer_divisor(optimizer, space, unseen="exclude")
    assert float(kept[1]) == pytest.approx(1e-9)
    assert left.isinf().tolist() == [False, True, False]
    assert torch.equal(kept[::2], left[::2])
    with pytest.raises(InputError, match="unseen must be"):
        optimizer_divisor(optimizer, space, unseen="drop")  # type: ignore[arg-type]


# -- phases -----------------------------------------------------------------------------------------------------------


def made(ratios: list[float], losses: list[float], every: int = 10, **others: list[float]) -> TrainingRecord:
    readings = tuple(
        TrainingReading(
            step=every * i,
            interval=every if i else 0,
            threshold=2.0,
            sharpness=2 * r,
            loss=loss,
            **{name: values[i] for name, values in others.items()},
        )
        for i, (r, loss) in enumerate(zip(ratios, losses, strict=True))
    )
    return TrainingRecord(readings=readings)


def phases(found: EdgeOfStability) -> list[str]:
    return [phase.name for phase in found.phases]


def test_phases() -> None:
    swings = [0.5, 0.5, -0.9, -1.1, -1.0, 0.2]
    found = edge_of_stability(made([0.5, 0.7, 1.0, 1.1, 1.05, 0.4], [6, 5, 4, 4, 3, 2], oscillation=swings))
    assert phases(found) == ["SHARPENING", "SHARPENING", "EDGE", "EDGE", "EDGE", "BELOW"]
    assert found.arrival == 20
    assert found.mean == pytest.approx((1.0 + 1.1 + 1.05 + 0.4) / 4)
    assert found.share_above == pytest.approx(2 / 6)
    assert found.oscillation == -1.0
    jump = edge_of_stability(made([2.0, 3.0, 0.6, 0.5], [1, 9, 2, 1]))
    assert phases(jump) == ["CATAPULT", "CATAPULT", "BELOW", "BELOW"]
    young = edge_of_stability(made([5.0, 0.6, 0.7, 1.0], [4, 3, 2, 1]))
    assert phases(young) == ["ABOVE", "SHARPENING", "SHARPENING", "EDGE"]
    assert young.arrival == 30
    lost = edge_of_stability(made([1.0, 1.5, 2.0, math.nan], [1, 2, 4, math.nan]))
    assert phases(lost) == ["EDGE", "UNSTABLE", "UNSTABLE", "UNSTABLE"]
    assert lost.arrival == 0
    blind = edge_of_stability(made([math.nan], [1]))
    assert phases(blind) == ["UNKNOWN"]
    assert blind.arrival is None
    assert math.isnan(blind.mean)
    assert math.isnan(blind.share_above)


def test_a_record_and_bounds_that_cannot_be() -> None:
    with pytest.raises(InputError, match="no reading"):
        edge_of_stability(TrainingRecord(readings=()))
    with pytest.raises(InputError, match="enclose 1"):
        edge_of_stability(made([1.0], [1.0]), low=1.1)
    with pytest.raises(InputError, match="'sharpnes'"):
        made([1.0], [1.0]).series("sharpnes")
    assert Phase.EDGE.value


# -- the regime itself ------------------------------------------------------------------------------------------------


def track(make: Callable[[Any], torch.optim.Optimizer], steps: int, width: int, every: int) -> TrainingRecord:
    """Full-batch training of a tanh network on digits with a squared loss."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data[:200], dtype=torch.float32) / 16
    x, y = x - x.mean(0), torch.eye(10)[torch.tensor(digits.target[:200])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    optimizer = make(model.parameters())

    def loss_of(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 0.5 * (outputs - targets).square().sum(1).mean()

    wanted = ["sharpness", "preconditioned", "oscillation"]
    tracker = CurvatureTracker(
        Objective(model, loss_of, (x, y)), optimizer, quantities=wanted, every=every, budget=None, generator=0
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        tracker.step(loss)
    return tracker.record


def test_sharpness_rises_to_the_threshold_of_the_rate_and_stays() -> None:
    record = track(lambda params: SGD(params, lr=0.6), steps=700, width=32, every=35)
    found = edge_of_stability(record)
    assert found.arrival is not None
    assert 100 < found.arrival < 500
    assert Phase.SHARPENING in found.phases[:3]
    late = [r.stability for r in record.readings if r.step >= 500]
    assert 0.97 < sum(late) / len(late) < 1.12
    assert -1.3 < found.oscillation < -0.8
