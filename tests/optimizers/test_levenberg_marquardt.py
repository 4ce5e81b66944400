"""Levenberg-Marquardt: certified fits, dense references in both dimensions, failure, networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvature.errors import InputError, NonFiniteError
from optimizers.newton.dense_jacobian import DampedLeastSquares, dense_jacobian
from optimizers.newton.evaluations import ResidualJacobian
from optimizers.newton.flat import FlatParams
from optimizers.newton.levenberg_marquardt import LevenbergMarquardt
from optimizers.newton.minimize import minimize
from optimizers.newton.natural_gradient import NaturalGradient
from optimizers.newton.pointwise import PointwiseResiduals
from tests.optimizers.mgh import PROBLEMS
from tests.optimizers.nist import SETS, log_relative_error
from tests.optimizers.nist_larger import LARGER

ALL = {**SETS, **LARGER}


def fit(name: str, start: int, steps: int = 700) -> tuple[Tensor, LevenbergMarquardt]:
    problem = ALL[name]
    b = nn.Parameter(torch.tensor(problem.starts[start], dtype=torch.float64))
    optimizer = LevenbergMarquardt([b])
    for _ in range(steps):
        optimizer.step(lambda: problem.residuals(b))
        report = optimizer.last_step
        assert report is not None
        if not report.accepted or report.step_norm <= 1e-13 * float(b.detach().norm()):
            break
    return b, optimizer


@pytest.mark.parametrize("name", ALL)
def test_certified_parameters_from_the_second_start(name: str) -> None:
    problem = ALL[name]
    b, optimizer = fit(name, 1)
    assert log_relative_error(b, problem.certified) >= 6.5
    deviations = optimizer.covariance(lambda: problem.residuals(b)).diagonal().sqrt()
    # the residuals of Lanczos1, and with them s, are the rounding of its 14 digits
    assert log_relative_error(deviations, problem.standard_deviations) >= (2.5 if name == "Lanczos1" else 4.5)
    squares = problem.residuals(b).detach().square().sum()
    assert float(squares) == pytest.approx(problem.residual_sum_of_squares, rel=1e-6, abs=1e-15)


FAR = ["Bennett5", "BoxBOD", "DanWood", "Eckerle4", "Lanczos1", "MGH09", "Misra1d", "Nelson", "Rat43", "Thurber"]


def test_certified_parameters_from_the_first_start() -> None:
    reached = {name: log_relative_error(fit(name, 0)[0], ALL[name].certified) for name in FAR}
    assert min(reached.values()) >= 6, reached


@pytest.mark.parametrize("name", ["Misra1a", "Lanczos2", "ENSO"])
def test_certified_values_belong_to_the_data(name: str) -> None:
    """A wrong digit in data or model shows as a residual sum of squares off its certified value."""
    found = ALL[name].residuals(torch.tensor(ALL[name].certified, dtype=torch.float64)).square().sum()
    assert float(found) == pytest.approx(ALL[name].residual_sum_of_squares, rel=1e-8)


def network(points: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(torch.float64)
    x = torch.randn(points, 2, dtype=torch.float64)
    return model, x, torch.sin(x.sum(1, keepdim=True))


def reference_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    named = {name: p.detach() for name, p in model.named_parameters()}
    blocks = jacrev(lambda values: functional_call(model, values, (x,)).reshape(-1))(named)
    return torch.cat([blocks[name].reshape(len(x), -1) for name in named], dim=1)


@pytest.mark.parametrize("points", [1, 7, 80], ids=["one residual", "fewer residuals", "more residuals"])
def test_dense_jacobian(points: int) -> None:
    model, x, _ = network(points)
    J = ResidualJacobian(FlatParams(list(model.parameters())), model(x))
    torch.testing.assert_close(dense_jacobian(J), reference_jacobian(model, x), rtol=1e-12, atol=1e-14)
    w = torch.randn(points, dtype=torch.float64)
    torch.testing.assert_close(J.T @ w, reference_jacobian(model, x).T @ w, rtol=1e-12, atol=1e-14)


def test_dense_jacobian_of_what_batching_gets_wrong() -> None:
    """Batch normalisation in train mode couples the rows; the check on a plain pass must not let a wrong J through."""
    model = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 1)).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    J = ResidualJacobian(FlatParams(list(model.parameters())), model(x))
    torch.testing.assert_close(dense_jacobian(J), reference_jacobian(model, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6), (1, 4), (4, 1)])
def test_damped_least_squares_against_normal_equations(shape: tuple[int, int]) -> None:
    J, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    D = torch.rand(shape[1], dtype=torch.float64) + 0.5
    expected = torch.linalg.solve(J.T @ J + 0.3 * torch.diag(D**2), J.T @ b)
    torch.testing.assert_close(DampedLeastSquares(J, D).solve(b, 0.3), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("points", [7, 80])
def test_routes_take_the_same_first_step(points: int) -> None:
    """With unit column scales the iterative route solves the same damped problem as a dense reference."""
    model, x, y = network(points)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    J, r = reference_jacobian(model, x), (model(x) - y).detach().reshape(-1)
    size = (J.T @ r).norm() / r.norm()
    expected = -torch.linalg.solve(J.T @ J + size**2 * torch.eye(J.shape[1], dtype=J.dtype), J.T @ r)
    optimizer = LevenbergMarquardt(model.parameters(), method="lsmr", rtol=1e-12, damping=1.0, acceleration=0)
    optimizer.step(lambda: model(x) - y)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert optimizer.last_step is not None
    assert optimizer.last_step.message.startswith("accepted at the 1.")
    torch.testing.assert_close(after - before, expected, rtol=1e-7, atol=1e-9)
    assert optimizer.last_step.model_decrease == pytest.approx(
        float(r @ r - (r + J @ expected).square().sum()) / 2, rel=1e-7
    )


@pytest.mark.parametrize("method", ["dense", "lsmr"])
@pytest.mark.parametrize("m", [3, 9], ids=["fewer residuals", "more residuals"])
def test_acceleration_against_closed_form(m: int, method: str) -> None:
    """Residuals A b + c (B b)^2 + 1 have the second derivative 2 c (B d)^2 along d, which differences give exactly."""
    n, c = 5, 0.05
    A, B = torch.randn(m, n, dtype=torch.float64), torch.randn(m, n, dtype=torch.float64)
    b = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = LevenbergMarquardt([b], damping=1.0, method=method, rtol=1e-14)  # type: ignore[arg-type]
    optimizer.step(lambda: A @ b + c * (B @ b) ** 2 + 1)
    ones = torch.ones(m, dtype=torch.float64)
    D2 = A.square().sum(0) if method == "dense" else ((A.T @ ones).norm() / ones.norm()).square().expand(n)
    damped = A.T @ A + torch.diag(D2)
    d = -torch.linalg.solve(damped, A.T @ ones)
    a = -torch.linalg.solve(damped, A.T @ (2 * c * (B @ d) ** 2))
    assert 1e-3 < float(2 * (D2 * a * a).sum().sqrt() / (D2 * d * d).sum().sqrt()) < 0.75
    report = optimizer.last_step
    assert report is not None
    assert report.message == "accepted at the 1. damping tried, accelerated"
    assert report.num_evaluations == 3
    torch.testing.assert_close(b.detach(), d + a / 2, rtol=1e-8, atol=1e-10)


def test_acceleration_is_left_out_where_it_is_large_or_rounding() -> None:
    for dtype in (torch.float32, torch.float64):
        A = torch.randn(9, 5, dtype=dtype)
        b = nn.Parameter(torch.ones(5, dtype=dtype))
        optimizer = LevenbergMarquardt([b])
        optimizer.step(partial(torch.addmv, torch.ones(9, dtype=dtype), A, b))
        assert optimizer.last_step is not None
        assert optimizer.last_step.message == "accepted at the 1. damping tried"
    b = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = LevenbergMarquardt([b], damping=1e-8)
    optimizer.step(lambda: b + 0.3 * (b - 1) ** 2)  # 2 |a| / |d| is 1.2
    assert optimizer.last_step is not None
    assert optimizer.last_step.message == "accepted at the 1. damping tried"
    assert float(b.detach()) == pytest.approx(0.0, abs=1e-7)


def test_acceleration_follows_a_curved_valley() -> None:
    """Powell's badly scaled function: half the steps."""
    steps = {}
    for acceleration in (0.0, 0.75):
        problem = PROBLEMS["powell-badly-scaled"]
        start = torch.tensor(problem.start, dtype=torch.float64)
        options = {"acceleration": acceleration}
        result = minimize(problem.residuals, start, method="levenberg-marquardt", gtol=1e-10, options=options)
        assert result.fun < 1e-20
        steps[acceleration] = result.nit
    assert 2 * steps[0.75] < steps[0.0]


@pytest.mark.parametrize("method", ["dense", "lsmr"])
def test_network_fits_fewer_points_than_parameters_exactly(method: str) -> None:
    model, x, y = network(9)
    optimizer = LevenbergMarquardt(model.parameters(), method=method)  # type: ignore[arg-type]
    for _ in range(40):
        optimizer.step(lambda: model(x) - y)
    assert float((model(x) - y).detach().square().sum()) < 1e-18


def poisson(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return jacrev(jacrev(lambda z: u(z)[0]))(x).diagonal().sum() + x.sum()


def test_pointwise_residuals_of_a_differential_equation() -> None:
    """Rows at once equal backward passes one after the other, weights and second derivatives included."""
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    inside, edge = torch.rand(6, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    residuals = PointwiseResiduals(
        model,
        [
            (lambda u, x: jacrev(jacrev(lambda z: u(z)[0]))(x).diagonal().sum() + x.sum(), inside),
            (lambda u, x: u(x), edge),
        ],
        weights=[1.0, 3.0],
    )
    params = list(model.parameters())
    r = residuals()
    rows = []
    for ri in r:
        grads = torch.autograd.grad(ri, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, params, strict=True)]
            )
        )
    torch.testing.assert_close(residuals.jacobian(params), torch.stack(rows), rtol=1e-10, atol=1e-12)
    mean_square = (model(edge).detach() ** 2).mean()
    torch.testing.assert_close(r[6:].detach().square().sum(), 3 * mean_square)
    first = LevenbergMarquardt(params, jacobian=residuals.jacobian)
    first.step(residuals)
    with pytest.raises(InputError, match="none of the model's"):
        residuals.jacobian([nn.Parameter(torch.zeros(2))])


def test_overflow_at_the_trial_point_shrinks_the_step() -> None:
    b = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = LevenbergMarquardt([b], damping=1e-12)
    optimizer.step(lambda: torch.sqrt(b) + 1e-3 * b + 1)  # the full step is far below zero
    assert optimizer.last_step is not None
    assert optimizer.last_step.accepted
    assert 0 <= float(b.detach()) < 1


def test_failures_leave_parameters_alone() -> None:
    b = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = LevenbergMarquardt([b])
    with pytest.raises(NonFiniteError, match="start of the step"):
        optimizer.step(lambda: b * math.nan)
    assert b.tolist() == [1.0, 2.0]

    def fails() -> Tensor:
        if fails.calls:  # type: ignore[attr-defined]
            raise RuntimeError("mine")
        fails.calls = 1  # type: ignore[attr-defined]
        return b**2

    fails.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="mine"):
        optimizer.step(fails)
    assert b.tolist() == [1.0, 2.0]


def test_minimum_and_zero_jacobian_are_told() -> None:
    b = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = LevenbergMarquardt([b])
    optimizer.step(lambda: b * 0 + 1)
    assert optimizer.last_step is not None
    assert optimizer.last_step.stationary
    assert b.grad is not None
    b2 = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = LevenbergMarquardt([b2])
    for _ in range(8):
        optimizer.step(lambda: b2 - 1)
    assert b2.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping must be positive"),
        ({"method": "svd"}, "method must be one of"),
        ({"max_trials": 0}, "max_trials"),
        ({"acceleration": -0.5}, "acceleration"),
        ({"rtol": 0.0}, "rtol must be positive"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LevenbergMarquardt([nn.Parameter(torch.ones(2))], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [LevenbergMarquardt, NaturalGradient])
def test_process_groups_are_refused(make: type[LevenbergMarquardt] | type[NaturalGradient]) -> None:
    """Residuals of ranks are different rows of one J; a step from a rank's own rows alone would be wrong."""
    group = cast(Any, object())
    with pytest.raises(InputError, match="residuals are solved for on one rank"):
        make([nn.Parameter(torch.ones(2))], process_group=group)


def test_bad_closures() -> None:
    b = nn.Parameter(torch.ones(2))
    optimizer = LevenbergMarquardt([b])
    with pytest.raises(InputError, match="residuals, a real tensor"):
        optimizer.step(lambda: 3.0)
    with pytest.raises(InputError, match="no graph"):
        optimizer.step(lambda: b.detach())
    with pytest.raises(InputError, match="curvature_closure"):
        optimizer.step(lambda: b, lambda: b)
    with pytest.raises(InputError, match="more residuals than parameters"):
        optimizer.covariance(lambda: b)
    with pytest.raises(InputError, match="full rank"):
        optimizer.covariance(lambda: torch.stack([b.sum(), 2 * b.sum() - 1, b.sum() + 1]))
    with pytest.raises(InputError, match="shape"):
        LevenbergMarquardt([b], jacobian=lambda _: torch.ones(2, 3)).step(lambda: b)


@pytest.mark.parametrize(("rescale_below", "scale"), [(0.0, 8.0), (1e-4, 8.0), (1.0, 3.0)])
def test_columns_are_scaled_anew_where_lambda_is_small(rescale_below: float, scale: float) -> None:
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = LevenbergMarquardt([w], damping=1e-2, rescale_below=rescale_below)
    for slope in (8.0, 3.0):
        optimizer.step(lambda slope=slope: slope * w - 1)
    assert optimizer.state[w]["column_scale"].item() == scale
