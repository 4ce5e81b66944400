"""Stochastic line search: the paper's loop, closures of every kind, ranks, and its claim under interpolation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curvature.errors import InputError, NonFiniteError
from optimizers import SLS
from tests.optimizers.problems import mlp
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group


def plain_sls(
    f: Callable[[Tensor, int], float], g: Callable[[Tensor, int], Tensor], w: Tensor, steps: int, reset: str, nb: int
) -> tuple[Tensor, list[float]]:
    """The algorithm of the paper: c = .1, shrink .9, growth 2; "restart" from 10; the authors' code caps nothing."""
    eta, etas = 0.0, []
    for t in range(steps):
        if eta == 0:
            eta = 1.0
        elif reset == "grow":
            eta *= 2 ** (1 / nb)
        elif reset == "restart":
            eta = 10.0
        gradient, start = g(w, t), f(w, t)
        while f(w - eta * gradient, t) > start - 0.1 * eta * float(gradient @ gradient):
            eta *= 0.9
        w = w - eta * gradient
        etas.append(eta)
    return w, etas


@pytest.mark.parametrize("reset", ["grow", "keep", "restart"])
def test_it_is_the_papers_loop(reset: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(4, 5, 3, generator=generator), torch.randn(4, 5, generator=generator)
    X, y = X.double(), y.double()
    f = lambda w, t: float((X[t % 4] @ w - y[t % 4]).square().mean())  # noqa: E731
    g = lambda w, t: 2 * X[t % 4].T @ (X[t % 4] @ w - y[t % 4]) / 5  # noqa: E731
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    expected, etas = plain_sls(f, g, start, 12, reset, 4)
    parts = [nn.Parameter(start[:1].clone()), nn.Parameter(start[1:].clone())]
    optimizer, found = SLS(parts, reset=reset, steps_per_epoch=4), []
    for t in range(12):
        loss = optimizer.step(lambda t=t: (X[t % 4] @ torch.cat(parts) - y[t % 4]).square().mean())  # type: ignore[misc]
        assert not loss.requires_grad
        assert optimizer.last_search is not None
        found.append(optimizer.last_search.step)
    torch.testing.assert_close(torch.cat(parts).detach(), expected, rtol=1e-10, atol=1e-12)
    assert found == pytest.approx(etas)


def test_closures_of_every_kind_take_the_same_steps() -> None:
    """The loss; (outputs, targets); one that calls backward() itself, clearing gradients in place."""
    ends = []
    for kind in ("loss", "pair", "backward", "in place"):
        problem = mlp()
        optimizer = SLS(problem.params, loss=F.cross_entropy)
        optimizer.step(problem.closure)

        def closure(problem: Any = problem, kind: str = kind, optimizer: SLS = optimizer) -> Any:
            if kind == "pair":
                return problem.pair()
            loss = problem.closure()
            if kind != "loss":
                optimizer.zero_grad(set_to_none=kind == "backward")
                loss.backward()
            return loss

        for _ in range(4):
            start, gradient = problem.flat(), problem.dense()[0]
            optimizer.step(closure)
            found = torch.cat([p.grad.reshape(-1) for p in problem.params if p.grad is not None])
            torch.testing.assert_close(found, gradient)  # the gradient where the step started is left in .grad
            torch.testing.assert_close(problem.flat(), start - optimizer.last_search.step * gradient)  # type: ignore[union-attr]
        ends.append(problem.flat())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-12)


def test_a_search_sees_one_function_and_leaves_the_trace_of_one_evaluation() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = SLS(model.parameters(), lr=5.0, max_step=5.0)
    states = []

    def closure() -> Tensor:
        states.append(torch.get_rng_state())
        return model(x).square().mean()

    optimizer.step(closure)
    assert len(states) > 2
    assert all(torch.equal(s, states[0]) for s in states)
    batch_norm = model[1]
    assert isinstance(batch_norm, nn.BatchNorm1d)
    assert int(batch_norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    assert not torch.equal(torch.get_rng_state(), states[0])


def test_rates_of_groups_are_units() -> None:
    a, b = (nn.Parameter(torch.tensor([3.0], dtype=torch.float64)) for _ in range(2))
    optimizer = SLS([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}])
    optimizer.step(lambda: a.square().sum() + b.square().sum())
    assert float((3 - b).detach()) == pytest.approx(2 * float((3 - a).detach()))


def test_losses_that_are_not_finite_count_as_too_large() -> None:
    w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    SLS([w]).step(lambda: -torch.log(w).sum() + w.square().sum() * 4)
    assert 0 < float(w.detach()) < 0.5
    with pytest.raises(NonFiniteError):
        SLS([w]).step(lambda: (w * math.inf).sum())
    v = nn.Parameter(torch.tensor([2.0]))
    optimizer = SLS([v], max_evaluations=3)
    optimizer.step(lambda: 1e6 * v.square().sum())
    assert optimizer.last_search is not None
    assert (float(v.detach()), optimizer.last_search.success, optimizer.last_search.num_evaluations) == (2.0, False, 3)


@pytest.mark.parametrize("reset", ["grow", "keep", "restart"])
def test_after_a_failed_search_the_next_goes_on_from_there(reset: Any) -> None:
    """Also over a checkpoint; three evaluations a search are too few, of the longest steps that pass 1.8e-6."""
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, tried = SLS([w], max_evaluations=3, reset=reset), []
    for _ in range(60):
        optimizer.step(lambda: 5e5 * w.square().sum())
        tried.append(optimizer.param_groups[0]["step_size"])
        if optimizer.last_search is not None and optimizer.last_search.success:
            break
        again = SLS([w], max_evaluations=3, reset=reset)
        again.load_state_dict(optimizer.state_dict())
        optimizer = again
    assert optimizer.last_search is not None
    assert optimizer.last_search.success
    assert all(later <= earlier for earlier, later in itertools.pairwise(tried))
    optimizer.step(lambda: 0.01 * w.square().sum())
    assert optimizer.last_search.step == {"grow": 2 * tried[-1], "keep": tried[-1], "restart": 10.0}[reset]


@pytest.mark.parametrize(
    ("name", "value"), [("maximize", True), ("max_step", 1e-3), ("decrease", 0.5), ("max_evaluations", 3)]
)
def test_groups_that_differ_in_more_than_their_rates_are_refused(name: str, value: Any) -> None:
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(InputError, match=f"{name} must be the same in all groups"):
        SLS([{"params": [a]}, {"params": [b], name: value}])
    optimizer = SLS([{"params": [a]}, {"params": [b], "lr": 0.1}])
    with pytest.raises(InputError, match=f"{name} must be the same in all groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], name: value})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[1][name] = value
    with pytest.raises(InputError, match=f"{name} must be the same in all groups"):
        optimizer.step(lambda: (a * b).square().sum())
    optimizer.param_groups[0][name] = value
    optimizer.step(lambda: (a * b).square().sum())


def test_a_closure_that_raises_leaves_the_parameters() -> None:
    w = nn.Parameter(torch.ones(2))
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("broken")
        return 10 * w.square().sum()

    with pytest.raises(ValueError, match="broken"):
        SLS([w]).step(closure)
    assert torch.equal(w.detach(), torch.ones(2))
    w.square().sum().backward()
    with pytest.raises(InputError, match=r"call step\(closure\)"):
        SLS([w]).step()


def trained(
    X: Tensor, target: Tensor, loss: Any, make: Callable[[list[nn.Parameter]], Any], seed: int, epochs: int, batch: int
) -> float:
    """Return the loss of a linear model on all data after some epochs, as a logarithm with base 10."""
    w = nn.Parameter(torch.zeros(X.shape[1], dtype=torch.float64))
    optimizer, order = make([w]), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(X), generator=order).split(batch):
            optimizer.zero_grad()

            def closure(rows: Tensor = rows) -> Tensor:
                return loss(X[rows] @ w, target[rows])  # type: ignore[no-any-return]

            if not isinstance(optimizer, SLS):
                closure().backward()
            optimizer.step(*[closure] if isinstance(optimizer, SLS) else [])
    return float(loss(X @ w, target).detach().log10())


def test_untuned_it_is_ahead_of_every_rate_of_sgd_under_interpolation() -> None:
    """Logistic regression on probabilities of one model: it is the best for every batch. Five orders of batches.

    Curvature falls by a factor of 10 over the axes. SGD's rates are a factor of 1.8 apart.
    """
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(500, 10, generator=generator, dtype=torch.float64) * torch.logspace(0, -0.5, 10)
    p = torch.sigmoid(X @ (2 * torch.randn(10, generator=generator, dtype=torch.float64)))
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    data = (X, torch.stack([p, entropy], 1))

    def loss(z: Tensor, of: Tensor) -> Tensor:
        return (F.binary_cross_entropy_with_logits(z, of[:, 0], reduction="none") - of[:, 1]).mean()

    ours = [trained(*data, loss, lambda w: SLS(w, steps_per_epoch=5), seed, 10, 100) for seed in range(5)]
    assert max(ours) < -5.9
    for lr in (3.2, 5.6, 10.0, 18.0, 32.0):
        of_sgd = [trained(*data, loss, lambda w, lr=lr: torch.optim.SGD(w, lr=lr), seed, 10, 100) for seed in range(5)]  # type: ignore[misc]
        assert sum(ours) / 5 < sum(of_sgd) / 5 - 0.3, (lr, ours, of_sgd)
        assert max(ours) < min(of_sgd), (lr, ours, of_sgd)


def test_on_separable_data_it_is_ahead_of_the_rates_that_lower_the_loss_only() -> None:
    """The logistic loss has no minimum there; SGD at 30 raises the loss for a while, and is ahead in the end."""
    generator = torch.Generator().manual_seed(7)
    X = torch.randn(120, 20, generator=generator, dtype=torch.float64)
    y = (X @ torch.randn(20, generator=generator, dtype=torch.float64)).sign()

    def mean(make: Any) -> float:
        return sum(trained(X, y, lambda z, y: F.softplus(-y * z).mean(), make, seed, 15, 12) for seed in range(3)) / 3

    ours = mean(lambda w: SLS(w, steps_per_epoch=10))
    for lr in (0.3, 3.0):
        assert ours < mean(lambda w, lr=lr: torch.optim.SGD(w, lr=lr)) - 0.1, lr  # type: ignore[misc]
    assert mean(lambda w: torch.optim.SGD(w, lr=30.0)) < ours - 1


def test_without_a_gradient_it_keeps_its_step() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SLS([w])
    optimizer.step(lambda: w.square().sum())
    before, at = optimizer.param_groups[0]["step_size"], w.detach().clone()
    for _ in range(2000):
        optimizer.step(lambda: (w * 0.0).sum())
    assert optimizer.param_groups[0]["step_size"] == before
    assert torch.equal(w.detach(), at)
    with pytest.raises(InputError, match="max_step must be None or positive and finite"):
        SLS([w], max_step=math.inf)


def _steps_on_ranks(rank: int, ranks: int) -> Tensor:
    torch.manual_seed(5)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randint(0, 3, (12,))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    rows = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    group = dist.group.WORLD if ranks > 1 else None
    optimizer = SLS(model.parameters(), process_group=group)
    called: Any = DistributedDataParallel(model) if ranks > 1 else model
    for _ in range(4):
        optimizer.step(lambda: F.cross_entropy(called(x[rows]), y[rows]))
    if ranks > 1:
        with pytest.raises(InputError, match="Pass process_group="):
            SLS(model.parameters()).step(lambda: F.cross_entropy(called(x[rows]), y[rows]))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        _compare(rank)


def _compare(rank: int) -> None:
    found = _steps_on_ranks(rank, 2)
    torch.testing.assert_close(found, _steps_on_ranks(0, 1), rtol=1e-10, atol=1e-12)


@IN_TWO_PROCESSES
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    in_two_processes(_work, str(tmp_path))
