"""`minimize` and `to_scipy` on published problems: More-Garbow-Hillstrom, Rosenbrock in many dimensions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import Objective
from curvature.errors import InputError, NotConvergedError
from optimizers.newton.minimize import METHODS, minimize, to_scipy
from optimizers.newton.newton_cg import NewtonCG
from tests.optimizers.mgh import PROBLEMS
from tests.optimizers.published import PUBLISHED

GENERAL = [name for name in METHODS if name not in ("levenberg-marquardt", "hessian-free")]


def near_a_minimum(value: float, minima: tuple[float, ...]) -> bool:
    return any(abs(value - m) <= 1e-4 * m + 1e-10 for m in minima)


CUBIC = ["rosenbrock", "beale", "bard", "kowalik-osborne", "biggs-exp6", "broyden-tridiagonal"]


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "trust-region") for name in PROBLEMS), *((name, "cubic") for name in CUBIC)]
)
def test_published_minima(name: str, method: str) -> None:
    problem = PROBLEMS[name]
    x0 = torch.tensor(problem.start, dtype=torch.float64)
    result = minimize(lambda x: problem.residuals(x).square().sum(), x0, method=method, gtol=1e-11, max_steps=500)
    assert near_a_minimum(result.fun, problem.minima), result
    assert x0.tolist() == problem.start


@pytest.mark.parametrize("name", PROBLEMS)
def test_published_minima_by_levenberg_marquardt(name: str) -> None:
    problem = PROBLEMS[name]
    x0 = torch.tensor(problem.start, dtype=torch.float64)
    result = minimize(problem.residuals, x0, method="levenberg-marquardt", max_steps=600, ftol=1e-14)
    assert near_a_minimum(2 * result.fun, problem.minima), result


FEW = ["JENSMP", "BROWNAL", "CLIFF", "SCHMVETT", "HATFLDD", "S308"]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("method", ["newton-cg", "trust-region", "gltr", "levenberg-marquardt"])
def test_no_success_is_false(name: str, method: str) -> None:
    """With a small budget and a sufficient one: what is called a success is a known minimum."""
    problem = PUBLISHED[name]
    objective = problem.residuals if method == "levenberg-marquardt" else problem.value
    if objective is None:
        return
    x0 = torch.tensor(problem.start, dtype=torch.float64)
    for budget in (5, 2000):
        result = minimize(objective, x0, method=method, max_gradients=budget)
        found = float(problem.value(result.x))
        reached = any(abs(found - m) <= 1e-6 * abs(m) + 1e-10 for m in problem.minima)
        assert reached or (budget == 5 and not result.success), result


@pytest.mark.parametrize("name", ["CUBE", "HUMPS", "LOGHAIRY"])
def test_a_stale_start_of_conjugate_gradients_ends_no_run(name: str) -> None:
    """An iterate kept from a start at the last solution may point uphill: conjugate gradients then start from zero."""
    problem = PUBLISHED[name]
    x0 = torch.tensor(problem.start, dtype=torch.float64)
    result = minimize(problem.value, x0, method="hessian-free", max_gradients=1000)
    assert result.success
    assert result.fun == pytest.approx(problem.minima[0], rel=1e-8, abs=1e-10)


def test_a_circle_is_not_fitted_by_a_line() -> None:
    """Damping that fell although the loss had fallen by twice what the model promised led to infinity."""
    problem = PUBLISHED["LSC1LS"]
    assert problem.residuals is not None
    x0 = torch.tensor(problem.start, dtype=torch.float64)
    result = minimize(problem.residuals, x0, method="levenberg-marquardt", ftol=1e-14)
    assert 2 * result.fun == pytest.approx(problem.minima[0], rel=1e-8)


@pytest.mark.parametrize("method", GENERAL)
def test_rosenbrock_through_scipy(method: str) -> None:
    """NumPy functions and SciPy's own derivatives; counts are those of the functions called."""
    calls = {"fun": 0, "jac": 0, "hessp": 0}
    seen: list[Any] = []

    def fun(x: np.ndarray) -> float:
        calls["fun"] += 1
        return float(scipy.optimize.rosen(x))

    def jac(x: np.ndarray) -> np.ndarray:
        calls["jac"] += 1
        return np.asarray(scipy.optimize.rosen_der(x))

    def hessp(x: np.ndarray, p: np.ndarray) -> np.ndarray:
        calls["hessp"] += 1
        return np.asarray(scipy.optimize.rosen_hess_prod(x, p))

    x0 = np.array([1.3, 0.7, 0.8, 1.9, 1.2])
    found = scipy.optimize.minimize(
        fun, x0, jac=jac, hessp=hessp, method=to_scipy(method), callback=seen.append, options={"maxiter": 400}
    )
    assert found.success, found
    np.testing.assert_allclose(found.x, np.ones(5), atol=1e-7)
    assert (found.nfev, found.njev, found.nhev) == (calls["fun"], calls["jac"], calls["hessp"])
    assert len(seen) == found.nit
    np.testing.assert_array_equal(seen[-1], found.x)
    assert np.abs(found.jac).max() <= 1e-8


def test_scipy_with_a_dense_hessian_and_arguments() -> None:
    found = scipy.optimize.minimize(
        lambda x, a: float(((x - a) ** 4).sum() + (x**2).sum()),
        np.zeros(3),
        args=(2.0,),
        jac=lambda x, a: 4 * (x - a) ** 3 + 2 * x,
        hess=lambda x, a: np.diag(12 * (x - a) ** 2 + 2),
        method=to_scipy("cubic"),
    )
    reference = scipy.optimize.brentq(lambda x: 4 * (x - 2) ** 3 + 2 * x, 0, 2)
    np.testing.assert_allclose(found.x, reference, atol=1e-8)


def test_closures_and_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) + 0.5
    result = minimize(lambda: (model(x) - y).square().mean(), params=list(model.parameters()), method="newton-cg")
    assert result.success
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    assert result.x.shape == (4,)


@pytest.mark.parametrize("method", ["newton-cg", "trust-region", "cubic", "saddle-free"])
def test_objectives(method: str) -> None:
    """A ridge of several batches, whose minimum is that of the normal equations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).double().eval()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    objective = Objective(model, nn.MSELoss(), [(x[:7], y[:7]), (x[7:], y[7:])])
    result = minimize(objective, method=method)
    assert result.success, result
    assert result.second_order == "minimum"
    one = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(one, y).solution
    torch.testing.assert_close(result.x[:, None], expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in model.parameters()]), result.x)
    assert result.fun == pytest.approx(float((one @ expected - y).square().mean()))
    for bad in ({"x0": torch.zeros(4)}, {"params": list(model.parameters())}, {"method": "levenberg-marquardt"}):
        with pytest.raises(InputError, match="objective"):
            minimize(objective, **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_steps_on_an_objective_are_those_of_its_closure(curvature: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 2, dtype=torch.float64), torch.randint(3, (12,))
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    twin = copy.deepcopy(model)
    objective = Objective(model, F.cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])])
    optimizers = [NewtonCG(m.parameters(), curvature=curvature, loss=F.cross_entropy) for m in (model, twin)]
    for _ in range(4):
        losses = [optimizers[0].step(objective), optimizers[1].step(lambda: (twin(x), y))]
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="parameters in its order"):
        optimizers[1].step(objective)
    with pytest.raises(InputError, match="leave curvature_closure out"):
        optimizers[0].step(objective, lambda: (model(x), y))


def test_budgets_tolerances_and_callbacks() -> None:
    def quartic(x: Tensor) -> Tensor:
        return (x**4).sum()

    start = torch.full((2,), 3.0, dtype=torch.float64)
    spent = minimize(quartic, start, max_steps=2, gtol=0.0)
    assert (spent.nit, spent.status, spent.success) == (2, 1, False)
    with pytest.raises(NotConvergedError, match="after 2 steps: the budget of steps") as failed:
        spent.raise_if_failed()
    assert failed.value.result is spent
    assert {"fun", "nit", "message"} <= set(spent.to_dict())
    assert "x" not in spent.to_dict()
    few = minimize(quartic, start, max_gradients=5, gtol=0.0)
    assert few.status == 1
    assert few.njev + few.nhev <= 8
    flat = minimize(quartic, start, ftol=0.9, gtol=0.0)
    assert (flat.status, flat.success) == (0, True)
    short = minimize(quartic, start, xtol=0.5, gtol=0.0)
    assert short.success
    seen = []
    stopped = minimize(quartic, start, callback=lambda step: bool(seen.append(step)) or len(seen) == 3, gtol=0.0)
    assert (stopped.nit, stopped.status) == (3, 1)
    torch.testing.assert_close(stopped.jac, 4 * stopped.x**3)
    assert stopped.fun == pytest.approx(float((stopped.x**4).sum()))


def test_a_minimum_to_rounding_is_told() -> None:
    """With gtol below rounding the run ends by itself, and says that the loss cannot fall."""
    result = minimize(lambda x: torch.cosh(x - 0.3).sum(), torch.zeros(2, dtype=torch.float64), gtol=0.0, max_steps=200)
    assert result.nit < 200
    assert result.status in (0, 2)
    torch.testing.assert_close(result.x, torch.full((2,), 0.3, dtype=torch.float64), rtol=1e-7, atol=1e-8)


def saddle(x: Tensor) -> Tensor:
    return (x[1:] ** 2).sum() - x[0] ** 2 + x[0] ** 4


def saddle_residuals(x: Tensor) -> Tensor:
    """Half the sum of their squares is the saddle's loss plus 1/4."""
    return 2**0.5 * torch.cat([x[1:], x[:1] ** 2 - 0.5])


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_strict_saddle_is_no_success(method: str, start: float) -> None:
    """The gradient has no part along the first axis: without a look the run ends at x = 0 with the loss 0."""
    objective = saddle_residuals if method == "levenberg-marquardt" else saddle
    x0 = torch.full((40,), start, dtype=torch.float64)
    x0[0] = 0.0
    result = minimize(objective, x0, method=method)
    assert result.success, result
    assert abs(result.x[0].item()) == pytest.approx(0.5**0.5, abs=1e-6)
    assert result.curvature == pytest.approx(2.0)
    assert result.second_order == "minimum"


def test_a_look_that_was_too_short_says_so() -> None:
    curvatures = torch.linspace(1e-4, 1, 2000, dtype=torch.float64)
    result = minimize(lambda x: (curvatures * x**2).sum(), torch.zeros(2000, dtype=torch.float64))
    assert result.success
    assert result.nhev == 32
    assert "too few to exclude a lower one" in result.message
    assert result.second_order == "not certified"
    without = minimize(lambda x: (x**2).sum(), torch.ones(3), max_gradients=4)
    assert without.success
    assert np.isnan(without.curvature)
    assert without.second_order == "not looked at"


def test_a_saddle_that_rounding_hides_is_no_success() -> None:
    """The minimum lies 2.5e-9 below the saddle, of 1e10."""
    result = minimize(
        lambda x: 1e10 + 1e-7 * (x[0] ** 2 - x[1] ** 2 + 10 * x[1] ** 4), torch.zeros(2, dtype=torch.float64)
    )
    assert (result.status, result.success, result.second_order) == (2, False, "saddle")
    assert result.curvature == pytest.approx(-2e-7)


@pytest.mark.parametrize("method", GENERAL)
@pytest.mark.parametrize("objective", ["rosenbrock", "logistic"])
def test_steps_that_stand_still_end_the_run(method: str, objective: str) -> None:
    """In float32 newton-cg spent 979 of 1000 steps where the loss was rounding, and ended by its budget."""
    torch.manual_seed(0)
    x, y = torch.randn(100, 5), (torch.rand(100) < 0.5).float()

    def loss(w: Tensor) -> Tensor:
        if objective == "rosenbrock":
            return (100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum()
        return nn.functional.binary_cross_entropy_with_logits(x @ w, y)

    start = torch.tensor([1.3, 0.7, 0.8, 1.9, 1.2])
    result = minimize(loss, start, method=method, gtol=1e-12)
    assert result.status == 2 or float(result.jac.abs().max()) == 0
    assert result.nit <= 60
    assert float(result.jac.abs().max()) < 1e-4


def test_bad_arguments() -> None:
    x0 = torch.zeros(2)
    with pytest.raises(InputError, match="method must be one of"):
        minimize(lambda x: x.sum(), x0, method="bfgs")
    with pytest.raises(InputError, match="one of them, not both"):
        minimize(lambda x: x.sum())
    with pytest.raises(InputError, match="residuals call minimize"):
        to_scipy("levenberg-marquardt")
    with pytest.raises(InputError, match="jac, and hessp or hess"):
        scipy.optimize.minimize(scipy.optimize.rosen, np.zeros(2), method=to_scipy("cubic"))
    with pytest.raises(InputError, match="bounds"):
        scipy.optimize.minimize(scipy.optimize.rosen, np.zeros(2), bounds=[(0, 1)] * 2, method=to_scipy("cubic"))


def test_rounding_is_not_told_as_curvature_and_what_was_not_looked_at_is_said() -> None:
    start = torch.zeros(2, dtype=torch.float64)
    scale = torch.tensor([1e8, 1e-8], dtype=torch.float64)
    found = minimize(lambda x: scale * (x - 1), start, method="levenberg-marquardt")
    assert "curvature met is zero to within" in found.message or found.curvature > 0
    hurried = minimize(lambda x: (x**2).sum(), start, max_gradients=1)
    assert "no product is left" in hurried.message
    with pytest.raises(InputError, match="x0 must have at least one entry"):
        minimize(lambda x: x.sum(), start[:0])
