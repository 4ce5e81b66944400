"""Smoothness along the gradient and Jacobians by depth: closed forms, then the published relations, small."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from analysis import CurvatureTracker, gradient_smoothness, layer_jacobians
from analysis.tasks.digits import load_digits
from curvature import Objective
from curvature.errors import InputError


def test_along_the_gradient_of_a_quadratic() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(3, 1, bias=False).double()
    objective = Objective(model, nn.MSELoss(), (x, torch.zeros(6, 1, dtype=torch.float64)))
    H = 2 * x.T @ x / 6
    w = model.weight.detach()[0]
    g = H @ w
    found = gradient_smoothness(objective, lr=0.3, multiples=(0.5, 2.0))
    losses = [float(v @ H @ v / 2) for v in (w - 0.15 * g, w - 0.6 * g)]
    assert (found.loss_low, found.loss_high) == pytest.approx((min(losses), max(losses)))
    bend = float((H @ g).norm())
    assert (found.gradient_change_low, found.gradient_change_high) == pytest.approx((0.15 * bend, 0.6 * bend))
    assert found.effective_smoothness == pytest.approx(bend / float(g.norm()))
    assert torch.equal(model.weight.detach()[0], w)
    with pytest.raises(InputError, match="lr and multiples must be positive"):
        gradient_smoothness(objective, lr=-1.0)
    beyond = Objective(nn.Linear(1, 1), lambda z, _: z.exp().mean(), (torch.ones(2, 1), torch.ones(2)))
    assert gradient_smoothness(beyond, lr=1e3, multiples=(1.0,)).loss_high < math.inf
    climbing = Objective(nn.Linear(1, 1), lambda z, _: (-z).exp().mean() + z.exp().mean(), beyond.settings["data"])
    assert gradient_smoothness(climbing, lr=1e6).effective_smoothness == math.inf


def test_the_tracker_takes_the_steps_of_its_optimizer() -> None:
    """For SGD the lengths are multiples of its learning rate; for Adam of the step it took."""
    torch.manual_seed(0)
    data = (torch.randn(12, 3), torch.randn(12, 2))
    for make in (lambda p: torch.optim.SGD(p, lr=0.2), lambda p: torch.optim.Adam(p, lr=0.2)):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        objective = Objective(model, nn.MSELoss(), data)
        twin = Objective(copy.deepcopy(model), nn.MSELoss(), data)
        optimizer = make(model.parameters())
        tracker = CurvatureTracker(objective, optimizer, quantities=("smoothness", "depth"), budget=None, generator=0)
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        reading = tracker.step()
        assert reading is not None
        length = reading.update_norm / reading.gradient_norm
        if isinstance(optimizer, torch.optim.SGD):
            assert length == pytest.approx(0.2, rel=1e-5)
        expected = gradient_smoothness(twin, lr=length)
        assert reading.effective_smoothness == pytest.approx(expected.effective_smoothness, rel=1e-4)
        assert (reading.path_loss_low, reading.path_loss_high) == pytest.approx((expected.loss_low, expected.loss_high))
        assert reading.gradient_change_high == pytest.approx(expected.gradient_change_high, rel=1e-4)
        squares = sum(norm**2 for norm in reading.layer_gradients.values())
        assert math.sqrt(squares) == pytest.approx(reading.gradient_norm, rel=1e-5)
        assert reading.layer_jacobians.keys() == {"0", "2"}


class Copied(nn.Module):
    """What autograd may hand to a layer that works in place."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.clone()


def test_jacobians_against_those_of_autograd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(40, 3)
    objective = Objective(model, nn.MSELoss(), [(x[:25], torch.zeros(25, 2)), (x[25:], torch.zeros(15, 2))])
    state = torch.get_rng_state()
    found = layer_jacobians(objective, num_probes=400, generator=0)
    assert torch.equal(state, torch.get_rng_state())
    for layer in (0, 2, 4):
        h = model[: layer + 1](x).detach()
        rest = model[layer + 1 :]
        cloned = nn.Sequential(Copied(), rest)
        squares = torch.stack([torch.autograd.functional.jacobian(cloned, row).square().sum() for row in h])
        assert found[str(layer)] == pytest.approx(float(squares.mean().sqrt()), rel=0.05)
    frozen = objective.restrict("4.*")
    assert layer_jacobians(frozen, num_probes=1, generator=0).keys() == {"4"}
    with pytest.raises(InputError, match="Jacobians need outputs"):
        layer_jacobians(
            Objective(model, None, (x, x), forward=lambda m, batch: m(batch[0]).square().mean()), generator=0
        )
    with pytest.raises(InputError, match="num_probes must be at least 1"):
        layer_jacobians(objective, num_probes=0, generator=0)


@pytest.mark.parametrize(
    ("std", "activation", "slope"),
    [(math.sqrt(2), nn.ReLU, 0.0), (1.0, nn.ReLU, -0.5), (1.0, nn.Identity, 0.0), (0.0, nn.Identity, 0.0)],
    ids=["He: kept", "1/n and ReLU: halved squares", "1/n, linear: kept", "orthogonal, linear: exactly"],
)
def test_errors_keep_their_size_or_vanish_by_initialisation(std: float, activation: type, slope: float) -> None:
    """Glorot and Bengio (2010), Saxe et al. (2014), He et al. (2015): |J|_F changes by 2^slope a layer."""
    depth, width = 16, 64
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        if std:
            nn.init.normal_(linear.weight, std=std / math.sqrt(width))
        else:
            nn.init.orthogonal_(linear.weight)
        layers += [linear, activation()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    data = (torch.randn(64, width), torch.randint(0, 10, (64,)))
    found = list(layer_jacobians(Objective(model, nn.CrossEntropyLoss(), data), generator=0).values())[:depth]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(found[: depth - 1])]
    mean = sum(slopes) / len(slopes)
    assert mean == pytest.approx(slope, abs=0.08 if std else 1e-5)
    if not std:
        assert max(map(abs, slopes)) < 1e-5


def test_batch_normalisation_makes_the_landscape_smoother_along_the_gradient() -> None:
    """Santurkar et al. (2018), figure 4: loss range, change of the gradient, effective smoothness, amid training."""
    (images, labels), _ = load_digits()
    medians = []
    for normalised in (True, False):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Flatten()]
        for width in (64, 32, 32):
            linear = nn.Linear(width, 32)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers += [linear, *([nn.BatchNorm1d(32)] if normalised else []), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(32, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        objective = Objective(model, nn.CrossEntropyLoss(), (images[:256], labels[:256]))
        tracker = CurvatureTracker(objective, optimizer, quantities=("smoothness",), every=10, budget=None, generator=0)
        for _ in range(141):
            rows = torch.randperm(len(images))[:128]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            tracker.step()
        late = [r for r in tracker.record.readings if r.step >= 80]
        measures = (
            [r.path_loss_high - r.path_loss_low for r in late],
            [r.gradient_change_high for r in late],
            [r.effective_smoothness for r in late],
        )
        medians.append([sorted(values)[len(values) // 2] for values in measures])
    assert all(with_it < without / 3 for with_it, without in zip(*medians, strict=True))
