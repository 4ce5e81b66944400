"""Newton's family: reductions to known steps, published problems, saddles, failure, state, batches, randomness."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.errors import InputError, NonFiniteError
from optimizers.newton.cubic_newton import CubicNewton
from optimizers.newton.full_batch import FullBatchOptimizer
from optimizers.newton.line_search import Armijo, Grid, StrongWolfe
from optimizers.newton.natural_gradient import NaturalGradient
from optimizers.newton.newton_cg import NewtonCG
from optimizers.newton.saddle_free import SaddleFreeNewton
from optimizers.newton.sketchy_newton import SketchyNewton
from optimizers.newton.trust_region_newton import TrustRegionNewton
from tests.optimizers.problems import mlp

PLAIN: dict[str, Any] = {"damping_rule": None, "stop": None, "rtol": 1e-13, "warm_start": 0.0, "keep": None}
TRIED: dict[str, Callable[..., FullBatchOptimizer]] = {  # look at the loss before they move
    "newton-cg": NewtonCG,
    "newton-cg-wolfe": lambda p, **s: NewtonCG(p, line_search=StrongWolfe(), **s),
    "newton-cg-nystrom": lambda p, **s: NewtonCG(p, preconditioner="nystrom", rank=4, refresh_every=3, **s),
    "newton-cg-diagonal": lambda p, **s: NewtonCG(p, preconditioner="diagonal", rank=8, **s),
    "steihaug": TrustRegionNewton,
    "gltr": lambda p, **s: TrustRegionNewton(p, subproblem="gltr", **s),
    "cubic": CubicNewton,
    "saddle-free": SaddleFreeNewton,
}
ALL = {**TRIED, "sketchy": lambda p, **s: SketchyNewton(p, rank=5, momentum=0.5, refresh_every=3, **s)}


def vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def report(optimizer: FullBatchOptimizer) -> Any:
    assert optimizer.last_step is not None
    return optimizer.last_step


# -- steps that are known ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.5, 3.0])
def test_damped_newton_step_against_dense_hessian(damping: float) -> None:
    problem = mlp()
    g, H = problem.dense()
    damping = damping - float(torch.linalg.eigvalsh(H)[0])
    before = problem.flat()
    NewtonCG(problem.params, damping=damping, line_search=None, **PLAIN).step(problem.closure)
    expected = -torch.linalg.solve(H + damping * torch.eye(len(g), dtype=g.dtype), g)
    torch.testing.assert_close(problem.flat() - before, expected, rtol=1e-8, atol=1e-11)


def test_large_damping_is_gradient_descent() -> None:
    problem = mlp()
    g, _ = problem.dense()
    before = problem.flat()
    NewtonCG(problem.params, damping=1e8, line_search=None, **PLAIN).step(problem.closure)
    torch.testing.assert_close(problem.flat() - before, -g / 1e8, rtol=1e-6, atol=0)


def test_gauss_newton_step_against_dense_matrix() -> None:
    problem = mlp()
    J = torch.autograd.functional.jacobian(
        lambda *ps: torch.func.functional_call(
            problem.model, dict(zip([n for n, _ in problem.model.named_parameters()], ps, strict=True)), (problem.x,)
        ),
        tuple(problem.params),
    )
    J = torch.cat([block.reshape(36, -1) for block in J], dim=1)
    z = problem.model(problem.x).detach()
    p = z.softmax(1)
    blocks = [torch.diag(row) - torch.outer(row, row) for row in p]
    G = J.T @ torch.block_diag(*blocks) @ J / 12
    g, _ = problem.dense()
    expected = -torch.linalg.solve(G + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    for make in (
        lambda ps: NewtonCG(ps, curvature="ggn", loss=F.cross_entropy, damping=0.1, line_search=None, **PLAIN),
        lambda ps: NaturalGradient(ps, loss=F.cross_entropy, damping=0.1, rtol=1e-13),
    ):
        problem = mlp()
        before = problem.flat()
        make(problem.params).step(problem.pair)
        torch.testing.assert_close(problem.flat() - before, expected, rtol=1e-8, atol=1e-11)


def test_curvature_of_another_batch() -> None:
    problem = mlp()
    part = slice(0, 6)
    g, _ = problem.dense()
    smaller = mlp()
    smaller.x, smaller.y = smaller.x[part], smaller.y[part]
    _, H = smaller.dense()
    before = problem.flat()
    optimizer = NewtonCG(problem.params, damping=2.0, line_search=None, **PLAIN)
    optimizer.step(problem.closure, problem.part(part))
    expected = -torch.linalg.solve(H + 2.0 * torch.eye(len(g), dtype=g.dtype), g)
    torch.testing.assert_close(problem.flat() - before, expected, rtol=1e-8, atol=1e-11)


def test_saddle_free_step_in_the_whole_space() -> None:
    problem = mlp()
    g, H = problem.dense()
    values, V = torch.linalg.eigh(H)
    before = problem.flat()
    optimizer = SaddleFreeNewton(problem.params, num_steps=len(g), damping=2.0)
    optimizer.step(problem.closure)
    expected = -V @ ((V.T @ g) / (values.abs() + 2.0))
    torch.testing.assert_close(problem.flat() - before, expected, rtol=1e-8, atol=1e-10)
    assert optimizer.last_step is not None
    assert f", {int((values < -1e-8).sum())} of negative curvature" in optimizer.last_step.solver


def test_saddle_free_tells_of_negative_curvature_only_where_it_is() -> None:
    w = nn.Parameter(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    optimizer = SaddleFreeNewton([w])
    solvers = []
    for _ in range(12):
        optimizer.step(lambda: w[0] ** 2 - w[1] ** 2 + w[1] ** 4)
        assert optimizer.last_step is not None
        solvers.append(optimizer.last_step.solver)
    assert solvers[0] == "basis of 2, invariant, 1 of negative curvature"
    assert not any("negative" in solver for solver in solvers[-3:])


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=["tall", "kernel"])
def test_spring_step_solves_its_least_squares_problem(shape: tuple[int, int]) -> None:
    """min |J d + r|^2 + lambda |d - mu d_before|^2, both steps, by dense normal equations."""
    A, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    w = nn.Parameter(torch.randn(shape[1], dtype=torch.float64))
    optimizer = NaturalGradient([w], lr=0.3, damping=0.2, momentum=0.8)
    before = torch.zeros(shape[1], dtype=torch.float64)
    system = A.T @ A + 0.2 * torch.eye(shape[1], dtype=torch.float64)
    for _ in range(3):
        start = w.detach().clone()
        expected = torch.linalg.solve(system, 0.2 * 0.8 * before - A.T @ (A @ start - b))
        optimizer.step(lambda: A @ w - b)
        torch.testing.assert_close(w.detach() - start, 0.3 * expected, rtol=1e-9, atol=1e-11)
        before = expected


def test_natural_gradient_bounds_and_searches() -> None:
    w = vector(10.0, -4.0)
    NaturalGradient([w], damping=1e-9, max_norm=0.5).step(lambda: w - 1)
    assert float((w.detach() - torch.tensor([10.0, -4.0])).norm()) == pytest.approx(0.5)
    optimizer = NaturalGradient([w], lr=4.0, damping=1e-9, line_search=Grid(num_steps=4))
    optimizer.step(lambda: w - 1)
    assert float((w.detach() - 1).norm()) < 1e-7
    assert "grid" in report(optimizer).message


def test_sketchy_step() -> None:
    """A sketch of full rank: -eta (|H| + rho)^-1 g, eta half of one over the preconditioned matrix's norm."""
    problem = mlp()
    g, H = problem.dense()
    values, V = torch.linalg.eigh(H)
    before = problem.flat()
    SketchyNewton(problem.params, lr=2.0, rank=len(g), rho=0.05).step(problem.closure)
    direction = V @ ((V.T @ g) / (values.abs() + 0.05))
    step = before - problem.flat()
    rate = float(step @ direction / (direction @ direction))
    torch.testing.assert_close(step, rate * direction, rtol=1e-6, atol=1e-9)
    largest = float((values.abs() / (values.abs() + 0.05)).max())
    assert 1.0 / largest <= rate <= 1.1 / largest  # ten power iterations see the norm from below


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sketchy_steps_are_shortened_where_the_curvature_grew(momentum: float) -> None:
    """With the rate of its first sketch it goes from 848 to infinity in four steps."""
    w = nn.Parameter(torch.tensor([1.3, 0.7, 0.8, 1.9, 1.2]))
    optimizer = SketchyNewton([w], momentum=momentum)
    losses = []
    for _ in range(40):
        optimizer.step(lambda: (100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum())
        assert optimizer.last_step is not None
        assert optimizer.last_step.loss_after <= (1 + 1e-6) * optimizer.last_step.loss_before
        losses.append(optimizer.last_step.loss_after)
    assert losses[-1] < 100


# -- problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIED)
def test_quadratic(name: str) -> None:
    torch.manual_seed(1)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    A = Q @ torch.diag(torch.logspace(-1, 2, 6, dtype=torch.float64)) @ Q.T
    w = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = TRIED[name]([w])
    for _ in range(60):
        optimizer.step(lambda: w @ A @ w / 2 + 1)
    assert float(w.detach().norm()) < 1e-5


@pytest.mark.parametrize("name", TRIED)
def test_leaves_the_neighbourhood_of_a_saddle(name: str) -> None:
    """x^2 - y^2 + y^4 near (1, 0): the saddle at 0 attracts Newton's method; minima at y = +-2^(-1/2), loss -1/4."""
    w = vector(1.0, 1e-4)
    optimizer = TRIED[name]([w])
    for _ in range(60):
        optimizer.step(lambda: w[0] ** 2 - w[1] ** 2 + w[1] ** 4)
    assert float(w[1].detach().abs()) == pytest.approx(2**-0.5, abs=1e-4)


@pytest.mark.parametrize(
    "make", [lambda p: TrustRegionNewton(p, subproblem="gltr", escape=True), lambda p: CubicNewton(p, escape=True)]
)
def test_escape_from_exact_saddles(make: Callable[..., FullBatchOptimizer]) -> None:
    w = vector(0.0, 0.0, 0.0)
    optimizer = make([w])
    for _ in range(30):
        optimizer.step(lambda: w[0] ** 2 + w[2] ** 2 - w[1] ** 2 + w[1] ** 4)
    assert float(w[1].detach().abs()) == pytest.approx(2**-0.5, abs=1e-5)
    assert report(optimizer).message == "the model has its minimum here" or report(optimizer).gradient_max < 1e-5


@pytest.mark.parametrize("name", TRIED)
def test_stationary_points_are_told(name: str) -> None:
    w = vector(0.0, 0.0)
    optimizer = TRIED[name]([w])
    optimizer.step(lambda: w[0] ** 2 - w[1] ** 2)
    assert report(optimizer).stationary
    assert not report(optimizer).accepted
    assert "gradient vanishes" in report(optimizer).message
    assert w.grad is not None


def logistic() -> tuple[nn.Parameter, Callable[[], Tensor]]:
    x = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(-3.5, 0, 12, dtype=torch.float64)
    y = (torch.rand(200, dtype=torch.float64) < 0.5).double()
    w = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    return w, lambda: F.binary_cross_entropy_with_logits(x @ w, y) + 1e-10 * w.square().sum()


@pytest.mark.parametrize("name", ["newton-cg", "newton-cg-wolfe", "newton-cg-nystrom", "steihaug", "gltr", "cubic"])
def test_ill_conditioned_logistic_regression(name: str) -> None:
    """Columns of very different size: the Hessian's condition number is above 1e6."""
    w, closure = logistic()
    settings: dict[str, Any] = {"damping": 1e-9, "stop": None} if name.startswith("newton") else {}
    settings = {"radius": 1e3} if name in ("steihaug", "gltr") else settings
    settings = {"sigma": 1e-6} if name == "cubic" else settings
    optimizer = TRIED[name]([w], **settings)
    for _ in range(60):
        optimizer.step(closure)
        if report(optimizer).gradient_max < 1e-9:
            break
    H = torch.autograd.functional.hessian(lambda v: logistic_at(v, w, closure), w.detach())
    assert torch.linalg.cond(H) > 1e6
    assert report(optimizer).gradient_max < 1e-9


def logistic_at(v: Tensor, w: nn.Parameter, closure: Callable[[], Tensor]) -> Tensor:
    cells = dict(zip(closure.__code__.co_freevars, closure.__closure__ or (), strict=True))
    x, y = cells["x"].cell_contents, cells["y"].cell_contents
    assert w.shape == v.shape
    return F.binary_cross_entropy_with_logits(x @ v, y) + 1e-10 * v.square().sum()


@pytest.mark.parametrize("name", ALL)
def test_closures_that_differentiate_themselves(name: str) -> None:
    """u' = cos t, u(0) = 0 by a network: the closure calls autograd.grad with create_graph."""
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    t = torch.linspace(0, 2, 12, dtype=torch.float64)[:, None].requires_grad_()

    def closure() -> Tensor:
        (slope,) = torch.autograd.grad(u(t).sum(), t, create_graph=True)
        return (slope - torch.cos(t)).square().mean() + u(t[:1]).square().sum()

    optimizer = ALL[name](u.parameters())
    first = float(closure().detach())
    for _ in range(15):
        optimizer.step(closure)
    assert float(closure().detach()) < (0.9 if name == "sketchy" else 0.05) * first
    assert all(p.grad is not None and not p.grad.requires_grad for p in u.parameters())


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_negative_curvature_is_used_in_the_very_step_that_meets_it(damping: float) -> None:
    """y^4 / 4 - y^2 / 2 from y = 0.1, with and without a convex direction that CG follows first."""
    for start in ([0.1], [1.0, 0.1]):
        w = vector(*start)
        optimizer = NewtonCG([w], damping=damping, damping_rule=None, stop=None)
        optimizer.step(lambda: w[-1] ** 4 / 4 - w[-1] ** 2 / 2 + 5 * (w[:-1] ** 2).sum())  # noqa: B023
        assert "no positive curvature" in report(optimizer).solver
        assert report(optimizer).accepted
        assert report(optimizer).model_decrease > 0
        assert float(w[-1].detach()) > 0.3


# -- failure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIED)
def test_overflow_shrinks_the_step(name: str) -> None:
    """log(x) - x / 10 is NaN left of 0: whatever the model says, the step ends where the loss is lower."""
    w = vector(0.05)
    optimizer = TRIED[name]([w])
    for _ in range(40):
        before = float((w.detach() - 0.01 * torch.log(w.detach())).sum())
        optimizer.step(lambda: (w - 0.01 * torch.log(w)).sum())
        assert float((w.detach() - 0.01 * torch.log(w.detach())).sum()) <= before + 1e-15
    assert float(w.detach()) == pytest.approx(0.01, abs=1e-6)


@pytest.mark.parametrize("name", TRIED)
def test_loss_that_only_rises_is_told(name: str) -> None:
    """A gradient that lies: the loss has no descent along it, and the step gives up within its limit."""
    w = vector(1.0, 2.0)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        value = w.square().sum()
        return value if len(calls) == 1 else value * 0 + 100.0 + (w - w.detach()).sum()

    optimizer = TRIED[name]([w])
    optimizer.step(closure)
    assert w.tolist() == [1.0, 2.0]
    assert not report(optimizer).accepted
    assert "no" in report(optimizer).message
    assert report(optimizer).loss_after == report(optimizer).loss_before == 5.0
    assert len(calls) < 200


@pytest.mark.parametrize("name", ALL)
def test_not_a_number_at_the_start(name: str) -> None:
    w = vector(1.0, 2.0)
    optimizer = ALL[name]([w])
    with pytest.raises(NonFiniteError, match="loss is nan at the start"):
        optimizer.step(lambda: w.sum() * math.nan)
    with pytest.raises(NonFiniteError, match="gradient is not finite"):
        optimizer.step(lambda: (w - w.detach()).abs().sqrt().sum())
    assert w.tolist() == [1.0, 2.0]


def with_gradient(w: nn.Parameter) -> NewtonCG:
    w.grad = torch.ones_like(w)
    return NewtonCG([w])


def test_closures_and_settings_that_do_not_fit() -> None:
    w = vector(1.0)
    with pytest.raises(InputError, match="call step"):
        with_gradient(w).step()
    with pytest.raises(InputError, match="one entry"):
        NewtonCG([w]).step(lambda: torch.stack([w, w]))
    with pytest.raises(InputError, match="loss= must be given"):
        NewtonCG([w]).step(lambda: (w, w))
    with pytest.raises(InputError, match="needs the split"):
        NewtonCG([w], curvature="ggn", loss=F.mse_loss).step(lambda: w.sum())
    with pytest.raises(InputError, match="needs loss="):
        TrustRegionNewton([w], curvature="ggn")
    with pytest.raises(InputError, match="no Gauss-Newton model"):
        NewtonCG([w], curvature="ggn", loss=F.mse_loss, maximize=True)
    for make, message in (
        (lambda: NewtonCG([w], damping=-1.0), "damping"),
        (lambda: NewtonCG([w], warm_start=2.0), "warm_start"),
        (lambda: NewtonCG([w], keep=1.0), "keep"),
        (lambda: NewtonCG([w], rtol="fast"), "rtol"),  # type: ignore[arg-type]
        (lambda: NewtonCG([w], preconditioner="ilu"), "preconditioner"),  # type: ignore[arg-type]
        (lambda: TrustRegionNewton([w], radius=0.0), "radius"),
        (lambda: TrustRegionNewton([w], escape=True), "escape"),
        (lambda: CubicNewton([w], sigma=math.inf), "sigma"),
        (lambda: SaddleFreeNewton([w], damping=0.0), "damping"),
        (lambda: SketchyNewton([w], rho=0.0), "rho"),
        (lambda: SketchyNewton([w], momentum=1.0), "momentum"),
        (lambda: NaturalGradient([w], max_norm=0.0), "max_norm"),
        (lambda: NaturalGradient([w], momentum=0.5, loss=F.mse_loss), "momentum"),
        (lambda: NewtonCG([w], lr=-1.0), "lr"),
        (lambda: NewtonCG([w], seed=0.5), "seed"),  # type: ignore[arg-type]
        (lambda: SketchyNewton([w], lr=torch.ones(2)), "lr must have one entry"),
        (lambda: NewtonCG([w], damping=torch.ones(2)), "damping must be one number"),  # type: ignore[arg-type]
        (lambda: CubicNewton([w], sigma=torch.ones(2)), "sigma must be one number"),  # type: ignore[arg-type]
        (lambda: SaddleFreeNewton([w], damping="much"), "damping must be one number"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=message):
            make()


# -- optimizers as torch has them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_resumed_run_repeats_bit_for_bit(name: str) -> None:
    problem = mlp()
    optimizer = ALL[name](problem.params, seed=3)
    for _ in range(4):
        optimizer.step(problem.closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(problem)
    fresh = ALL[name](twin.params)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.randn(3)
    for _ in range(4):
        optimizer.step(problem.closure)
        fresh.step(twin.closure)
        assert torch.equal(problem.flat(), twin.flat())


@pytest.mark.parametrize("name", ALL)
def test_groups_are_one_problem(name: str) -> None:
    """Splitting the parameters into groups changes nothing; a group with lr 0, where there is one, stays."""
    one, two = mlp(), mlp()
    joint = ALL[name](one.params)
    split = ALL[name]([{"params": two.params[:1]}, {"params": two.params[1:]}])
    for _ in range(3):
        joint.step(one.closure)
        split.step(two.closure)
    assert torch.equal(one.flat(), two.flat())


@pytest.mark.parametrize("make", [NewtonCG, SaddleFreeNewton, SketchyNewton])
def test_learning_rates_of_groups(make: Callable[..., FullBatchOptimizer]) -> None:
    problem = mlp()
    before = [p.detach().clone() for p in problem.params]
    optimizer = make([{"params": problem.params[:1], "lr": 0.0}, {"params": problem.params[1:]}])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(problem.closure)
    scheduler.step()
    assert torch.equal(problem.params[0], before[0])
    assert not torch.equal(problem.params[1], before[1])
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.5]


@pytest.mark.parametrize("name", TRIED)
def test_maximize_mirrors_minimize(name: str) -> None:
    up, down = mlp(), mlp()
    climbing, falling = TRIED[name](up.params, maximize=True), TRIED[name](down.params)
    for _ in range(3):
        climbing.step(lambda: -up.closure())
        falling.step(down.closure)
    torch.testing.assert_close(up.flat(), down.flat(), rtol=0, atol=0)
    assert report(climbing).loss_after == pytest.approx(-report(falling).loss_after)


@pytest.mark.parametrize("name", TRIED)
def test_dropout_has_one_mask_within_a_step_and_the_next_in_the_next(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    x, masks = torch.randn(20, 3, dtype=torch.float64), []

    def closure() -> Tensor:
        masks.append(torch.get_rng_state())
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    optimizer = TRIED[name](model.parameters())
    optimizer.step(closure)
    assert len(masks) > 1
    assert all(torch.equal(m, masks[0]) for m in masks)
    first = masks[0]
    masks.clear()
    optimizer.step(closure)
    assert not torch.equal(masks[0], first)


@pytest.mark.parametrize("name", ALL)
def test_low_precision_and_frozen_parameters(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.clone()
    x = torch.randn(8, 3, dtype=torch.bfloat16)
    optimizer = ALL[name](model.parameters())
    for _ in range(2):
        optimizer.step(lambda: (model(x).float() - 1).square().mean())
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in model.parameters())
    assert torch.equal(model[0].bias, frozen)


def test_reports_count_what_was_spent() -> None:
    problem = mlp()
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return problem.closure()

    optimizer = TrustRegionNewton(problem.params, radius=1e-3)
    loss = optimizer.step(closure)
    step = report(optimizer)
    assert step.num_evaluations == len(calls)
    assert (step.num_gradients, step.num_products) == (1, 1)  # the first direction leaves so small a region
    assert (
        float(loss) == step.loss_before > step.loss_after == pytest.approx(float(problem.closure().detach()), abs=1e-15)
    )
    assert step.ratio == pytest.approx(1.0, abs=1e-2)
    assert step.step_norm == pytest.approx(1e-3)
    assert step.radius == 2e-3
    assert "boundary" in step.solver


def test_checkpoints_reach_a_fresh_optimizer() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    problem = mlp()
    optimizer = NewtonCG(problem.params)
    for _ in range(3):
        optimizer.step(problem.closure)
    twin = copy.deepcopy(problem)
    fresh = NewtonCG(twin.params)
    set_optimizer_state_dict(twin.model, fresh, get_optimizer_state_dict(problem.model, optimizer))
    optimizer.step(problem.closure)
    fresh.step(twin.closure)
    assert torch.equal(problem.flat(), twin.flat())


@pytest.mark.parametrize("name", ALL)
def test_copies_are_whole(name: str) -> None:
    problem = mlp()
    optimizer = ALL[name](problem.params)
    optimizer.step(problem.closure)
    problem2, twin = copy.deepcopy((problem, optimizer))
    optimizer.step(problem.closure)
    twin.step(problem2.closure)
    assert torch.equal(problem.flat(), problem2.flat())


def test_line_searches_can_be_exchanged() -> None:
    ends = []
    for search in (Armijo(), Armijo(decrease=0.4), StrongWolfe(), Grid(num_steps=6), None):
        w = vector(-1.2, 1.0)
        optimizer = NewtonCG([w], line_search=search)
        for _ in range(60):
            optimizer.step(lambda: 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2)  # noqa: B023
        ends.append(float((w.detach() - 1).norm()))
    assert max(ends) < 1e-6, ends
