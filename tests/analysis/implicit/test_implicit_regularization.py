"""Implicit regularization against partitions and orders enumerated one by one, and flows integrated by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis.implicit.measure import adam_correction, implicit_regularization, penalty_gradients
from analysis.implicit.results import expected_batch_variance, momentum_factors
from curvature import HessianOperator, Objective
from curvature.errors import InputError
from curvature.linalg import eigsh

LOSS = nn.MSELoss()


def problem(count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return model, x, torch.randn(count, 1, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the loss as a function of the flat parameters, by `functional_call`."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def value(flat: Tensor) -> Tensor:
        parts = [s.reshape(shape) for s, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        return LOSS(torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,)), y)

    return value


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def over_all_orders(count: int, size: int, *, drop_last: bool, factors: tuple[float, float]) -> Tensor:
    """Return M (N, N) with sum_ij M_ij g_i'g_j = the mean over all orders of what the batches add to P |g|^2.

    That is P |h|^2 + V (1/m) sum_k |g_k - h|^2 - P |g|^2, h the mean of the m batches' gradients g_k.
    """
    orders = torch.tensor(list(itertools.permutations(range(count))))
    parts = [orders[:, s : s + size] for s in range(0, count - size + 1 if drop_last else count, size)]
    members, sizes = [nn.functional.one_hot(part, count).sum(1).double() for part in parts], [p.shape[1] for p in parts]
    m, (P, V) = len(parts), factors
    together = [[a.T @ b / len(orders) for b in members] for a in members]  # of whole numbers: no rounding adds up
    of_mean = sum(together[j][k] / (sizes[j] * sizes[k] * m**2) for j in range(m) for k in range(m))
    of_batches = sum(together[k][k] / (sizes[k] ** 2 * m) for k in range(m))
    return torch.as_tensor(P * (of_mean - 1 / count**2) + V * (of_batches - of_mean))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", range(1, 9))
def test_penalty_is_the_mean_over_all_orders(batch_size: int, drop_last: bool) -> None:
    """Value, layers and direction against every order of 8 examples, the last batch short or left out."""
    model, x, y = problem(8)
    theta, lr, momentum = flat(model), 0.2, 0.7 if batch_size % 2 else 0.0
    losses = [loss_of(model, x[i : i + 1], y[i : i + 1]) for i in range(8)]
    m = 8 // batch_size + (8 % batch_size > 0 and not drop_last)
    factors = momentum_factors(lr, momentum, m)
    rows = torch.stack([torch.func.grad(loss)(theta) for loss in losses])
    M = over_all_orders(8, batch_size, drop_last=drop_last, factors=factors)
    found = implicit_regularization(
        Objective(model, LOSS, (x, y)),
        lr=lr,
        batch_size=batch_size,
        drop_last=drop_last,
        momentum=momentum,
        directions=True,
    )
    rounding = 1e-12 * found.batch_factor * found.example_trace
    expected = [float((M * (part @ part.T)).sum()) for part in (rows, rows[:, :9], rows[:, 9:])]
    penalties = [found.batch_penalty, *found.layer_batch_penalties.tolist()]
    assert found.num_batches == m
    assert penalties == pytest.approx(expected, rel=1e-12, abs=rounding)
    assert found.full_penalty == pytest.approx(factors[0] * float(rows.mean(0).square().sum()), rel=1e-10)
    other = replace(found, batch_size=2.0, num_batches=4.0)
    assert other.batch_penalty_at(batch_size) == pytest.approx(found.batch_penalty, rel=1e-12, abs=rounding)
    hessians = [torch.func.jacrev(torch.func.grad(loss))(theta) for loss in losses]
    pull = 2 * torch.stack([H @ v for H, v in zip(hessians, M @ rows, strict=True)]).sum(0)
    assert found.batch is not None
    torch.testing.assert_close(found.batch.gradient, pull, rtol=1e-10, atol=1e-13)


def test_examples_of_unequal_weight_are_said_to_be_first_order() -> None:
    """Two classes of which one counts 1.3 times: within a few per cent of all orders, and the note says so."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(8, 3).double(), torch.tensor([0, 1] * 4)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.3]).double())

    def gradient(part: tuple[int, ...]) -> Tensor:
        value = loss(model(x[list(part)]), y[list(part)])
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))])

    g, parts = gradient(tuple(range(8))), list(itertools.combinations(range(8), 4))
    exact = sum(float((gradient(part) - g).square().sum()) for part in parts) / len(parts)
    found = implicit_regularization(Objective(model, loss, (x, y)), lr=0.1, batch_size=4, directions=True)
    assert found.batch_variance == pytest.approx(exact, rel=0.03)
    assert "first order" in found.notes[0]
    assert found.batch is not None
    before, h = [p.detach().clone() for p in model.parameters()], 1e-5
    ends = []
    for sign in (1, -1):
        moved = flat(model) + sign * h * found.batch.gradient / found.batch.norm
        nn.utils.vector_to_parameters(moved, model.parameters())
        ends.append(implicit_regularization(Objective(model, loss, (x, y)), lr=0.1, batch_size=4).batch_penalty)
        nn.utils.vector_to_parameters(torch.cat([p.reshape(-1) for p in before]), model.parameters())
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(found.batch.norm, rel=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_penalties_of_given_batches_and_their_gradients(weight_decay: float) -> None:
    model, x, y = problem()
    theta, sizes = flat(model), (3, 1, 2)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    losses = [loss_of(model, *batch) for batch in batches]

    def gradients(t: Tensor) -> Tensor:
        return torch.stack([torch.func.grad(loss)(t) for loss in losses]) + weight_decay * t

    def full(t: Tensor) -> Tensor:
        return 0.1 * gradients(t).mean(0).square().sum()

    def noise(t: Tensor) -> Tensor:
        rows = gradients(t)
        return 0.1 * (rows - rows.mean(0)).square().sum(1).mean()

    found = implicit_regularization(Objective(model, LOSS, batches), lr=0.4, weight_decay=weight_decay, directions=True)
    assert found.full_penalty == pytest.approx(float(full(theta)), rel=1e-10)
    assert found.batch_penalty == pytest.approx(float(noise(theta)), rel=1e-10)
    g = gradients(theta).mean(0)
    for direction, penalty in ((found.full, full), (found.batch, noise)):
        exact = torch.func.grad(penalty)(theta)
        assert direction is not None
        torch.testing.assert_close(direction.gradient, exact, rtol=1e-8, atol=1e-12)
        assert direction.cosine_with_gradient == pytest.approx(float(torch.cosine_similarity(exact, g, dim=0)))
    decay = weight_decay / 2 * float(theta.square().sum())
    assert found.loss == pytest.approx(sum(float(loss(theta)) for loss in losses) / 3 + decay, rel=1e-10)


def test_angles_with_eigenvectors_and_the_change_of_sharpness() -> None:
    model, x, y = problem()
    objective = Objective(model, LOSS, [(x[:3], y[:3]), (x[3:], y[3:])])
    top = eigsh(HessianOperator(objective), 2, rtol=1e-10, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in model.parameters()]
    found = implicit_regularization(objective, lr=0.4, top=top)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    theta, loss = flat(model), loss_of(model, x, y)
    for direction in (found.full, found.batch):
        assert direction is not None
        assert direction.cosines_with_top is not None
        d = direction.gradient
        exact = (top.eigenvectors.T @ d).abs() / d.norm()
        torch.testing.assert_close(direction.cosines_with_top, exact)
        sharpness = [
            float(torch.linalg.eigvalsh(torch.func.jacrev(torch.func.grad(loss))(theta - t * d))[-1])
            for t in (1e-4, -1e-4)
        ]
        assert direction.sharpness_change == pytest.approx((sharpness[0] - sharpness[1]) / 2e-4, rel=1e-3)


def test_error_bar_of_the_variance() -> None:
    """Linear regression at w = 0 with y = e: Gamma of the population is E |2 e x|^2 = 4 d."""
    d, count, scores = 3, 150, []
    model = nn.Linear(d, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    for seed in range(300):
        z = torch.randn(count, d + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = implicit_regularization(Objective(model, LOSS, (z[:, :d], z[:, d:])), lr=0.1, batch_size=10)
        exact = 4 * d * (count - 1) / count * (count - 10) / (count - 1) / 10
        scores.append((found.batch_variance - exact) / found.batch_variance_stderr)
    z = torch.tensor(scores)
    assert abs(float(z.mean())) < 0.45  # skewed: low estimates come with low errors
    assert 0.85 < float(z.std()) < 1.4


# -- momentum and Adam: against the trajectories themselves -----------------------------------------------------------


def rk4(field: Callable[[Tensor], Tensor], theta: Tensor, time: float, steps: int) -> Tensor:
    h = time / steps
    for _ in range(steps):
        a = field(theta)
        b = field(theta + h / 2 * a)
        c = field(theta + h / 2 * b)
        d = field(theta + h * c)
        theta = theta + h / 6 * (a + 2 * b + 2 * c + d)
    return theta


def downhill(gradient: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: -gradient(t)


def slope(errors: list[float], lrs: list[float]) -> float:
    return math.log(errors[-2] / errors[-1]) / math.log(lrs[-2] / lrs[-1])


def test_full_batch_momentum_follows_its_modified_flow() -> None:
    """Heavy ball to a fixed time: O(lr) from the flow of C, O(lr^2) from that of the modified loss."""
    model, x, y = problem()
    loss, beta, lrs, T = loss_of(model, x, y), 0.5, [0.02, 0.01], 1.0
    grad = torch.func.grad(loss)
    plain, modified = [], []
    for lr in lrs:
        h = lr / (1 - beta)
        theta, steps = flat(model), round(T / h)
        velocity = grad(theta) / (1 - beta)  # on the slow manifold to first order
        for _ in range(steps):
            velocity = beta * velocity + grad(theta)
            theta = theta - lr * velocity
        P = momentum_factors(lr, beta, 1)[0]
        tilted = torch.func.grad(lambda t, P=P: loss(t) + P * torch.func.grad(loss)(t).square().sum())
        plain.append(float((theta - rk4(downhill(grad), flat(model), T, 40)).norm()))
        modified.append(float((theta - rk4(downhill(tilted), flat(model), T, 40)).norm()))
    assert slope(plain, lrs) == pytest.approx(1, abs=0.15)
    assert slope(modified, lrs) == pytest.approx(2, abs=0.3)
    assert modified[-1] < plain[-1] / 5


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_noise_under_momentum_over_all_orders(beta: float) -> None:
    """An epoch in every order, the velocity run out: its second-order term beyond the full batch's is the penalty."""
    model, x, y = problem()
    theta0, m = flat(model), 3
    grads = [torch.func.grad(loss_of(model, x[2 * k : 2 * k + 2], y[2 * k : 2 * k + 2])) for k in range(m)]

    def epoch(functions: list[Callable[[Tensor], Tensor]], lr: float) -> Tensor:
        theta, velocity = theta0, torch.zeros_like(theta0)
        for function in functions:
            velocity = beta * velocity + function(theta)
            theta = theta - lr * velocity
        return theta - lr * beta / (1 - beta) * velocity

    objective = Objective(model, LOSS, [(x[2 * k : 2 * k + 2], y[2 * k : 2 * k + 2]) for k in range(m)])
    of_batch = penalty_gradients(objective)[1]
    errors, lrs = [], [2e-3, 1e-3]
    for lr in lrs:
        orders = list(itertools.permutations(grads))
        mean = torch.stack([epoch(list(order), lr) for order in orders]).mean(0)
        full = epoch([lambda t: sum(f(t) for f in grads) / m] * m, lr)
        V = momentum_factors(lr, beta, m)[1]
        predicted = -m * lr / (1 - beta) * V * of_batch
        errors.append(float((mean - full - predicted).norm() / predicted.norm()))
    assert errors[-1] < 0.02
    assert errors[-1] < 0.6 * errors[0]  # what is left is of the next order


def test_adam_follows_its_corrected_flow() -> None:
    """Full-batch Adam (eps under the root) to a fixed time: O(lr) from the plain flow, O(lr^2) from the corrected."""
    model, x, y = problem()
    b1, b2, eps, T, lrs = 0.5, 0.8, 0.05, 0.4, [4e-3, 2e-3]
    loss = loss_of(model, x, y)
    grad = torch.func.grad(loss)
    start, plain, corrected = flat(model), [], []

    def correction(theta: Tensor, lr: float) -> Tensor:
        probe = problem()[0]
        nn.utils.vector_to_parameters(theta, probe.parameters())
        return adam_correction(Objective(probe, LOSS, (x, y)), lr=lr, betas=(b1, b2), eps=eps)

    for lr in lrs:
        theta, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
        for step in range(1, round(T / lr) + 1):
            g = grad(theta)
            first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g
            theta = theta - lr * first / (1 - b1**step) / (second / (1 - b2**step) + eps).sqrt()

        def field(t: Tensor, rate: float = lr, *, bent: bool = True) -> Tensor:
            g = grad(t)
            return -(g + (correction(t, rate) if bent else 0)) / (g * g + eps).sqrt()

        plain.append(float((theta - rk4(partial(field, bent=False), start, T, 12)).norm()))
        corrected.append(float((theta - rk4(field, start, T, 12)).norm()))
    assert slope(plain, lrs) == pytest.approx(1, abs=0.2)
    assert slope(corrected, lrs) > 1.7
    assert corrected[-1] < plain[-1] / 4


def test_one_batch_one_example_and_bad_arguments() -> None:
    model, x, y = problem()
    one = implicit_regularization(Objective(model, LOSS, (x, y)), lr=0.1, directions=True)
    assert one.batch_penalty == 0
    assert one.batch is not None
    assert one.batch.norm == 0
    assert math.isnan(one.batch.cosine_with_gradient)
    assert math.isnan(one.batch_penalty_at(2))
    single = implicit_regularization(Objective(model, LOSS, (x[:1], y[:1])), lr=0.1, batch_size=1)
    assert single.batch_variance == 0
    assert expected_batch_variance(5.0, 10, 10) == 0
    objective = Objective(model, LOSS, (x, y))
    bad: list[dict[str, Any]] = [{"lr": 0.0}, {"batch_size": 7}, {"batch_size": 0}, {"momentum": 1.0}]
    bad.append({"drop_last": True})
    for settings in bad:
        with pytest.raises(InputError):
            implicit_regularization(objective, **{"lr": 0.1, **settings})
    with pytest.raises(InputError, match="averages"):
        implicit_regularization(Objective(model, nn.MSELoss(reduction="sum"), (x, y)), lr=0.1, batch_size=2)
    with pytest.raises(InputError, match="betas"):
        adam_correction(objective, lr=0.1, betas=(1.0, 0.5))


def test_examples_alone_have_other_masks_than_in_their_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(8, 4).double(), torch.arange(8) % 3))
    assert implicit_regularization(objective, lr=0.1, batch_size=4).batch_penalty > 0
    with pytest.raises(InputError, match=r"dropout.*model.eval\(\)"):
        implicit_regularization(objective, lr=0.1, batch_size=4, directions=True)
    model.eval()
    assert implicit_regularization(objective, lr=0.1, batch_size=4, directions=True).batch is not None
