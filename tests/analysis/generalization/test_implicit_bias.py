"""Implicit bias: trainings of small models against their theorems, and the theorems against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import analysis
from curvature.errors import InputError

F64 = torch.float64


def matrix(values: list[float], m: int = 6, n: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(m, len(values), generator=g, dtype=F64)).Q
    V = torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=F64)).Q
    return U @ torch.diag(torch.tensor(values, dtype=F64)) @ V.T


def planted(n: int, d: int, entries: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    X, b = torch.randn(n, d, generator=g, dtype=F64), torch.zeros(d, dtype=F64)
    b[: len(entries)] = torch.tensor(entries, dtype=F64)
    return X, X @ b, b


# -- deep linear networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_singular_values_follow_the_closed_form_within_one_percent(depth: int) -> None:
    found = analysis.train_deep_linear(matrix([3.0, 2.0, 1.0]), depth=depth, scale=1e-2, generator=0)
    assert found.deviation < 0.01
    assert float(found.balance.max()) < 1e-12
    assert float((found.singular_values[-1, :3] - torch.tensor([3.0, 2.0, 1.0])).abs().max()) < 0.05
    if depth > 1:  # one after the other: the large ones first
        half = [int((found.singular_values[:, k] > s / 2).nonzero()[0]) for k, s in enumerate((3.0, 2.0, 1.0))]
        assert half == sorted(half)
        assert half[2] > 2 * half[0]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_closed_form_solves_its_equation(depth: int) -> None:
    s, u = torch.tensor([2.0, 0.7, 0.0], dtype=F64), torch.tensor([0.05, 0.3, 0.2], dtype=F64)
    times = torch.linspace(0, 2, 4001, dtype=F64)
    found = analysis.deep_linear_singular_values(s, u, times, depth=depth)
    torch.testing.assert_close(found[0], u)
    slope = (found[2:] - found[:-2]) / (times[2:] - times[:-2])[:, None]
    inner = found[1:-1]
    torch.testing.assert_close(slope, depth * inner ** (2 - 2 / depth) * (s - inner), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("depth", [2, 3])
def test_rates_of_singular_values_hold_for_any_balanced_start_and_loss(depth: int) -> None:
    """Against a step of autograd on the factors, for a loss that is no distance to a matrix."""
    g = torch.Generator().manual_seed(1)
    factors = [torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=F64)).Q for _ in range(depth)]
    D = torch.diag(torch.tensor([1.1, 0.8, 0.5, 0.3], dtype=F64))
    turns = [torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=F64)).Q for _ in range(depth + 1)]
    factors = [(a @ D @ b.T).requires_grad_() for b, a in itertools.pairwise(turns)]
    M = torch.randn(4, 4, generator=g, dtype=F64)

    def product(parts: list[Tensor]) -> Tensor:
        W = parts[0]
        for part in parts[1:]:
            W = part @ W
        return W

    W = product(factors).detach().requires_grad_()
    (gradient,) = torch.autograd.grad((M * W.sin()).sum(), W)
    steps = torch.autograd.grad((M * product(factors).sin()).sum(), factors)
    u, rates = analysis.singular_value_rates([f.detach() for f in factors], gradient)
    eps = 1e-5
    ends = [
        torch.linalg.svdvals(product([f.detach() - h * s for f, s in zip(factors, steps, strict=True)]))
        for h in (eps, -eps)
    ]
    torch.testing.assert_close(u, torch.linalg.svdvals(W.detach()))
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * eps), rates, rtol=1e-6, atol=1e-8)


def test_depth_completes_a_matrix_of_low_rank_better_than_one_layer() -> None:
    S = matrix([2.0], 8, 8)
    seen = torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) < 0.7
    errors = {}
    for depth in (1, 2):
        run = analysis.train_deep_linear(S, depth=depth, scale=1e-3, observed=seen, time=30.0, aligned=False)
        assert float(run.loss[-1]) < 1e-3
        assert math.isnan(run.deviation)
        errors[depth] = float((run.product - S).norm() / S.norm())
    assert errors[2] < 0.2 * errors[1]


# -- diagonal linear networks -----------------------------------------------------------------------------------------


def test_small_starts_find_the_least_l1_norm_and_large_ones_the_least_l2_norm() -> None:
    X, y, b = planted(20, 40, [1.0, -0.7])
    small, large = analysis.diagonal_linear_flow(X, y, 1e-4), analysis.diagonal_linear_flow(X, y, 30.0)
    middle = analysis.diagonal_linear_flow(X, y, 0.1)
    torch.testing.assert_close(small.least_l1, b, rtol=0, atol=1e-8)
    torch.testing.assert_close(small.least_l2, torch.linalg.pinv(X) @ y)
    assert small.distance(small.least_l1) < 1e-3 < 0.5 < small.distance(small.least_l2)
    assert large.distance(large.least_l2) < 1e-3 < 0.5 < large.distance(large.least_l1)
    for run in (small, middle, large):
        assert run.distance(run.expected) < 1e-5
    assert min(middle.distance(middle.least_l1), middle.distance(middle.least_l2)) > 0.1


def test_flow_is_that_of_gradient_descent_on_the_network() -> None:
    X, y, _ = planted(6, 10, [1.0, -0.7])
    alpha = 0.2
    run = analysis.diagonal_linear_flow(X, y, alpha)
    u, v = (torch.full((10,), alpha, dtype=F64, requires_grad=True) for _ in range(2))
    end, lr = float(run.times[len(run.times) // 2]), 2e-3
    steps = round(end / lr)
    for _ in range(steps):
        loss = (X @ (u.square() - v.square()) - y).square().sum() / 12
        gradients = torch.autograd.grad(loss, (u, v))
        with torch.no_grad():
            for w, g in zip((u, v), gradients, strict=True):
                w -= end / steps * g
    found = (u.square() - v.square()).detach()
    torch.testing.assert_close(found, run.path[len(run.times) // 2], rtol=0, atol=2e-3)
    assert float(run.losses[-1]) < 1e-10 * float(run.losses[0])


def test_potential_is_least_at_the_solution_and_between_the_norms() -> None:
    X, y, _ = planted(5, 9, [1.0, -0.7])
    for alpha in (1e-2, 1.0):
        b = analysis.least_q(X, y, alpha)
        torch.testing.assert_close(X @ b, y, rtol=1e-8, atol=1e-8)
        free = torch.linalg.svd(X).Vh[5:]  # directions that change no output
        here = b.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(analysis.q_potential(here, alpha), here)
        assert float((free @ gradient).abs().max()) < 1e-6 * float(gradient.abs().max())
        for k in range(4):
            assert float(analysis.q_potential(b + 0.1 * free[k], alpha)) > float(analysis.q_potential(b, alpha))
    b = torch.tensor([1.5, -0.2], dtype=F64)
    large, tiny = float(analysis.q_potential(b, 1e3)), float(analysis.q_potential(b, 1e-40))
    assert large == pytest.approx(float(b.square().sum()) / 4e6, rel=1e-5)
    assert tiny == pytest.approx(math.log(1e80) * 1.7, rel=2e-2)


# -- label noise ------------------------------------------------------------------------------------------------------


def test_label_noise_follows_its_flow_to_the_flattest_solution() -> None:
    X, y, b = planted(10, 30, [1.0, 0.7])
    off = {}
    for lr, steps in ((0.02, 12000), (0.01, 48000)):
        run = analysis.label_noise_descent(X, y, noise=0.7, lr=lr, steps=steps, start=0.7, generator=0)
        off[lr] = float(((run.trace - run.expected_trace) / run.expected_trace).abs().mean())
    assert off[0.01] < 0.08
    assert off[0.01] < off[0.02]
    torch.testing.assert_close(run.expected, b, rtol=0, atol=1e-8)
    torch.testing.assert_close(X @ run.flow, y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(X @ run.start, y, rtol=1e-6, atol=1e-6)
    near, far = (float((x - b).norm() / b.norm()) for x in (run.solution, run.start))
    assert near < 0.2 < 1 < far
    J = 2 * X * run.start.sqrt()  # of the outputs in v: H = J'J / n where the loss is zero
    assert float(J.square().sum() / len(X)) == pytest.approx(float(4 * X.square().mean(0) @ run.start))


def test_without_noise_nothing_moves() -> None:
    X, y, _ = planted(4, 12, [1.0, 0.7])
    run = analysis.label_noise_descent(X, y, noise=0.0, steps=200, generator=0)
    torch.testing.assert_close(run.solution, run.start, rtol=1e-6, atol=1e-8)
    assert float(run.trace.std()) < 1e-6 * float(run.trace[0])


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_equal_times_no_time_and_values_of_any_size(depth: int) -> None:
    s, u, times = (torch.tensor(x, dtype=F64) for x in ([2.0, 0.5], [0.01, 3.0], [0.0, 0.0, 1.0, 1.0, 2.0]))
    found = analysis.deep_linear_singular_values(s, u, times, depth=depth)
    single = analysis.deep_linear_singular_values(s, u, times[::2], depth=depth)
    torch.testing.assert_close(found, single[[0, 0, 1, 1, 2]], rtol=1e-8, atol=0)
    torch.testing.assert_close(analysis.deep_linear_singular_values(s, u, times[:1], depth=depth), u[None])
    assert analysis.deep_linear_singular_values(s, u, times[:0], depth=depth).shape == (0, 2)
    far = analysis.deep_linear_singular_values(1e150 * s, 1e-200 * u, times[-1:], depth=depth)
    assert bool(torch.isfinite(far).all())
    unit = 1e6 ** (2 / depth - 2)  # u = c v at t = c^(2/N - 2) tau
    scaled = analysis.deep_linear_singular_values(1e6 * s, 1e6 * u, unit * times, depth=depth)
    torch.testing.assert_close(scaled, 1e6 * found, rtol=1e-7, atol=0)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_default_time_suffices_from_above_too(depth: int) -> None:
    run = analysis.train_deep_linear(2e-3 * torch.eye(2), depth=depth, scale=1e-2)
    torch.testing.assert_close(run.singular_values[-1], torch.full((2,), 2e-3, dtype=F64), rtol=1e-2, atol=0)


def test_starts_of_any_size_in_any_units() -> None:
    X, y, _ = planted(3, 8, [1.0])
    for alpha in (1e-10, 0.3, 1e10):
        run = analysis.diagonal_linear_flow(X, y, alpha)
        assert run.distance(run.expected) < 1e-5
        assert run.distance(run.least_l1 if alpha < 1 else run.least_l2) < (1e-5 if alpha != 0.3 else 1)
        other = analysis.diagonal_linear_flow(1e3 * X, 1e-4 * y, alpha * 1e-7**0.5)
        torch.testing.assert_close(other.solution, 1e-7 * run.solution, rtol=1e-4, atol=1e-12)
        assert float(other.times[-1]) == pytest.approx(10 * float(run.times[-1]), rel=1e-2)
    b = torch.tensor([1.5, -0.2], dtype=F64)
    for alpha in (1e-100, 1e100):
        assert 0 < float(analysis.q_potential(b, alpha)) < math.inf
    assert float(analysis.q_potential(b, 1e100)) == pytest.approx(float(b.square().sum()) / 4e200, rel=1e-9)


def test_bad_input_is_refused() -> None:
    X, y, _ = planted(3, 8, [1.0])
    twice = torch.cat([X, X[:1]])
    for call, said in (
        (lambda: analysis.diagonal_linear_flow(twice, torch.cat([y, y[:1]]), 1.0), "independent"),
        (lambda: analysis.diagonal_linear_flow(X, y[:2], 1.0), "must be"),
        (lambda: analysis.diagonal_linear_flow(X, y, 0.0), "alpha"),
        (lambda: analysis.least_norm(X, y, order=3), "order"),
        (lambda: analysis.q_potential(y, -1.0), "alpha"),
        (lambda: analysis.label_noise_descent(X, y, noise=-1.0, generator=0), "noise"),
        (lambda: analysis.label_noise_descent(X, y, lr=3.0, generator=0), "diverged"),
        (lambda: analysis.label_noise_descent(X[:, :3], y, generator=0), "one solution"),
        (lambda: analysis.train_deep_linear(torch.zeros(2, 2)), "other than zero"),
        (lambda: analysis.train_deep_linear(X, scale=0.0), "scale"),
        (lambda: analysis.train_deep_linear(X, observed=X > 99), "observed"),
        (lambda: analysis.deep_linear_singular_values(y.abs(), -y.abs() - 1, y.abs().cumsum(0)), "positive"),
        (lambda: analysis.singular_value_rates([X, X], y), "fit"),
        (lambda: analysis.deep_linear_singular_values(y * math.nan, y.abs() + 1, y.abs().cumsum(0)), "finite"),
        (lambda: analysis.diagonal_linear_flow(X, y, 1e-20), "least_norm"),
        (lambda: analysis.least_q(X, y, 1e200), "least_norm"),
        (lambda: analysis.q_potential(y, 1e200), "alpha"),
        (lambda: analysis.label_noise_descent(X, y, start=1e200, generator=0), "start"),
        (lambda: analysis.label_noise_descent(X, y, lr=math.inf, generator=0), "lr"),
    ):
        with pytest.raises(InputError, match=said):
            call()
