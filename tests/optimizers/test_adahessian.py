"""AdaHessian against the paper's formulas in plain Python, on dense Hessians; every public deviation likewise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.errors import InputError
from optimizers import AdaHessian
from optimizers.shared.probes import random_signs
from tests.optimizers.problems import Problem, convolutional, mlp, train

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def kernel_mean(t: Tensor) -> Tensor:
    """Average over the spatial axes, one kernel at a time."""
    out = t.clone()
    if t.ndim == 4:
        for i in range(t.shape[0]):
            for j in range(t.shape[1]):
                out[i, j] = sum(t[i, j].reshape(-1)) / t[i, j].numel()
    return out


def reference(
    problem: Problem,
    steps: int,
    *,
    lr: float = 0.15,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    wd: float = 0.0,
    k: float = 1.0,
    every: int = 1,
    probes: int = 1,
    magnitudes_averaged: bool = False,
    averaged: bool = True,
    stale_again: bool = False,
    all_steps: bool = False,
    row_norm: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Return the trajectory of Algorithm 1, or of a named deviation from it, entry by entry from dense Hessians."""
    m = [torch.zeros_like(p) for p in problem.params]
    V = [torch.zeros_like(p) for p in problem.params]
    last = [torch.zeros_like(p) for p in problem.params]
    refreshes, path = 0, []
    for t in range(1, steps + 1):
        g, H = problem.dense()
        due = (t - 1) % every == 0
        if due:
            refreshes += 1
            samples = []
            count = max(probes, 10) if row_norm and refreshes == 1 else probes  # the first is not divided by chance
            for s in range(count):
                z = torch.cat([q.reshape(-1) for q in random_signs(problem.params, seed, t - 1, s)])
                samples.append((H @ z) if row_norm else z * (H @ z))
            D = sum(h**2 for h in samples) / count if row_norm else sum(samples) / count
            D = problem.split(D.sqrt() if row_norm else D)
            if magnitudes_averaged:
                D = [d.abs() for d in D]
            last = [kernel_mean(d) if averaged else d for d in D]
        for i, (p, gi) in enumerate(zip(problem.params, problem.split(g), strict=True)):
            m[i] = b1 * m[i] + (1 - b1) * gi
            if due or stale_again:
                V[i] = b2 * V[i] + (1 - b2) * last[i] ** 2
            n = t if stale_again or all_steps else refreshes
            step = (m[i] / (1 - b1**t)) / ((V[i] / (1 - b2**n)).sqrt() ** k + eps)
            p.data = p.data - lr * (step + wd * p.data)
        path.append(problem.flat())
    return path


def trajectory(problem: Problem, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    path = []
    for _ in range(steps):
        optimizer.step(problem.closure)
        path.append(problem.flat())
    return path


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "decay": ({"weight_decay": 0.1}, {"wd": 0.1}),
    "power": ({"hessian_power": 0.5}, {"k": 0.5}),
    "lazy": ({"update_every": 3}, {"every": 3}),
    "probes": ({"num_probes": 4}, {"probes": 4}),
    "row norm": ({"curvature": "row-norm", "num_probes": 3}, {"row_norm": True, "probes": 3}),
    "no average": ({"spatial_average": None}, {"averaged": False}),
    "betas": ({"betas": (0.5, 0.9), "seed": 7}, {"b1": 0.5, "b2": 0.9, "seed": 7}),
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "official": {"magnitudes_averaged": True},
    "torch_optimizer": {"magnitudes_averaged": True, "k": 0.5},
    "davda54": {"averaged": False, "lr": 0.1, "eps": 1e-8, "stale_again": True},
    "kozistr": {"averaged": False, "lr": 0.1, "eps": 1e-16, "all_steps": True},
}


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("make", [mlp, convolutional])
@pytest.mark.parametrize("case", CASES)
def test_algorithm_1(case: str, make: Any, foreach: bool) -> None:
    settings, plain = CASES[case]
    problem, twin = make(), make()
    path = trajectory(problem, AdaHessian(problem.params, lr=0.05, foreach=foreach, **settings), 5)
    expected = reference(twin, 5, lr=0.05, **plain)
    for theta, theta_expected in zip(path, expected, strict=True):
        torch.testing.assert_close(theta, theta_expected, **EXACT)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_public_implementations(name: str, every: int) -> None:
    plain = IMPLEMENTATIONS[name]
    lr = 0.01 * plain.get("lr", 0.15)
    problem, twin = convolutional(), convolutional()
    optimizer = AdaHessian.like(name, problem.params, lr=lr, update_every=every)
    assert (optimizer.defaults["eps"], optimizer.defaults["hessian_power"]) == (
        plain.get("eps", 1e-4),
        plain.get("k", 1.0),
    )
    path = trajectory(problem, optimizer, 5)
    for theta, expected in zip(path, reference(twin, 5, **{**plain, "lr": lr}, every=every), strict=True):
        torch.testing.assert_close(theta, expected, **EXACT)


def test_learning_rates_of_public_implementations() -> None:
    rates = {name: AdaHessian.like(name, mlp().params).defaults["lr"] for name in IMPLEMENTATIONS}
    assert rates == {"official": 0.15, "torch_optimizer": 0.15, "davda54": 0.1, "kozistr": 0.1}


def test_presets_differ() -> None:
    """The options exist because they matter: no two implementations give the same path."""
    ends = []
    for name in [*IMPLEMENTATIONS, None]:
        problem = convolutional()
        make = AdaHessian if name is None else lambda p, name=name, **s: AdaHessian.like(name, p, **s)
        ends.append(trajectory(problem, make(problem.params, lr=0.01, update_every=3), 5)[-1])
    for i, a in enumerate(ends):
        assert all(not torch.allclose(a, b, rtol=1e-6) for b in ends[:i])


def test_newton_step_on_diagonal_quadratic() -> None:
    """beta = 0 and a diagonal Hessian: one probe is exact, and one step of size 1 is Newton's."""
    curvatures = torch.tensor([0.1, 1.0, 50.0, 1e4], dtype=torch.float64)
    w = torch.tensor([3.0, -2.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    AdaHessian([w], lr=1.0, betas=(0.0, 0.0), eps=0.0).step(lambda: (0.5 * curvatures * (w - 1) ** 2).sum())
    torch.testing.assert_close(w.detach(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_closed_form_trajectory_on_diagonal_quadratic() -> None:
    """Without momentum every coordinate of a diagonal quadratic contracts by 1 - lr, whatever its curvature."""
    curvatures = torch.tensor([0.1, 1.0, 50.0], dtype=torch.float64)
    w = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64, requires_grad=True)
    start = w.detach().clone()
    optimizer = AdaHessian([w], lr=0.3, betas=(0.0, 0.999), eps=0.0, update_every=4)
    for t in range(1, 11):
        optimizer.step(lambda: (0.5 * curvatures * w**2).sum())
        torch.testing.assert_close(w.detach(), start * 0.7**t, rtol=1e-12, atol=0)


def test_first_steps_measure_curvature_one_by_one() -> None:
    problem, twin = mlp(), mlp()
    lazy = AdaHessian(problem.params, lr=0.05, update_first=4, update_every=3)
    due = []
    for _ in range(10):
        due.append(lazy.curvature_due)
        lazy.step(problem.closure)
    assert due == [True, True, True, True, False, False, True, False, False, True]
    dense = AdaHessian(twin.params, lr=0.05)
    for _ in range(4):
        dense.step(twin.closure)
    dense.param_groups[0]["update_every"] = 3  # the same by hand
    for _ in range(6):
        dense.step(twin.closure)
    assert torch.equal(problem.flat(), twin.flat())


def test_identity_curvature_is_momentum() -> None:
    """H = I, eps = 0: the bias-corrected average of gradients, as Adam with unit denominators has it."""
    w = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    twin, m = w.detach().clone(), torch.zeros(2, dtype=torch.float64)
    optimizer = AdaHessian([w], lr=0.1, eps=0.0)
    for t in range(1, 8):
        optimizer.step(lambda: 0.5 * (w**2).sum())
        m = 0.9 * m + 0.1 * twin
        twin = twin - 0.1 * m / (1 - 0.9**t)
    torch.testing.assert_close(w.detach(), twin, **EXACT)


def test_power_zero_is_momentum_whatever_the_curvature() -> None:
    problem, twin = mlp(), mlp()
    optimizer = AdaHessian(problem.params, lr=0.1, hessian_power=0.0, eps=0.0)
    train(optimizer, problem.closure, 5)
    m = torch.zeros_like(twin.flat())
    for t in range(1, 6):
        g, _ = twin.dense()
        m = 0.9 * m + 0.1 * g
        for p, d in zip(twin.params, twin.split(m / (1 - 0.9**t)), strict=True):
            p.data -= 0.1 * d
    torch.testing.assert_close(problem.flat(), twin.flat(), **EXACT)


def test_average_of_squares_estimates_the_row_norm() -> None:
    """At a fixed point one probe's V tends to the squared row norm, as the docstring says; many probes' to H_ii^2."""
    problem = mlp()
    _, H = problem.dense()
    for probes, expected in [(1, (H**2).sum(1)), (16, H.diagonal() ** 2 + ((H**2).sum(1) - H.diagonal() ** 2) / 16)]:
        optimizer = AdaHessian(problem.params, lr=0.0, betas=(0.0, 0.9999), num_probes=probes)
        samples = []
        for _ in range(400):
            before = [
                optimizer.state[p].get("exp_hessian_diag_sq", torch.zeros_like(p)).clone() for p in problem.params
            ]
            optimizer.step(problem.closure)
            after = [optimizer.state[p]["exp_hessian_diag_sq"] for p in problem.params]
            seen = [(a - 0.9999 * b) / (1 - 0.9999) for a, b in zip(after, before, strict=True)]
            samples.append(torch.cat([s.reshape(-1) for s in seen]))
        drawn = torch.stack(samples)
        z = (drawn.mean(0) - expected) / (drawn.std(0) / 400**0.5)
        assert z.abs().max() < 4.5
        assert 0.6 < z.std() < 1.6


def test_gauss_newton_curvature_trains() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params, lr=0.02, curvature="gauss-newton-bartlett", loss=F.cross_entropy)
    losses = train(optimizer, problem.pair, 30)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a number >= 0"),
        ({"betas": (1.0, 0.9)}, "betas must be two numbers"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"eps": -1e-8}, "eps must be a number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"hessian_power": float("nan")}, "hessian_power must be"),
        ({"absolute": "never"}, "absolute must be one of"),
        ({"stale": "never"}, "stale must be one of"),
        ({"bias_correction": "never"}, "bias_correction must be one of"),
        ({"spatial_average": "mean"}, "spatial_average must be one of"),
        ({"spatial_average": 5}, "divide a row"),
        ({"curvature": "exact"}, "curvature must be one of hessian-diagonal"),
        ({"num_probes": 0}, "num_probes must be an integer >= 1"),
        ({"update_every": 0}, "update_every must be an integer >= 1"),
        ({"update_every": 1.5}, "update_every must be an integer >= 1"),
        ({"update_first": 0}, "update_first must be an integer >= 1"),
        ({"seed": None}, "seed must be an integer"),
        ({"lr": torch.tensor([0.1, 0.2])}, "one entry"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdaHessian(mlp().params, **settings)


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="implementation must be one of official"):
        AdaHessian.like("unofficial", mlp().params)
