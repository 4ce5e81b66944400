"""Energy natural gradients: the direct and the randomised step against dense pseudo-inverses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.errors import InputError
from optimizers import NaturalGradient, PointwiseResiduals

SHAPES = pytest.mark.parametrize("shape", [(24, 9), (9, 24)], ids=["tall", "kernel"])


def problem(shape: tuple[int, int]) -> tuple[nn.Parameter, Tensor, Tensor]:
    """Return w, A with singular values over four orders of magnitude, and b."""
    g = torch.Generator().manual_seed(1)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=g, dtype=torch.float64), full_matrices=False)
    A = U @ torch.diag(torch.logspace(0, -4, min(shape), dtype=torch.float64)) @ V
    w = nn.Parameter(torch.randn(shape[1], generator=g, dtype=torch.float64))
    return w, A, torch.randn(shape[0], generator=g, dtype=torch.float64)


@SHAPES
def test_the_direct_step_without_damping_is_that_of_the_pseudo_inverse(shape: tuple[int, int]) -> None:
    """The shortest least-squares step, -J^+ r, also where J J' has a condition number of 1e8."""
    w, A, b = problem(shape)
    start = w.detach().clone()
    NaturalGradient([w], damping=1e-24).step(lambda: A @ w - b)
    expected = -torch.linalg.pinv(A) @ (A @ start - b)
    torch.testing.assert_close(w.detach() - start, expected, rtol=1e-8, atol=1e-8)


@SHAPES
@pytest.mark.parametrize("rank", [1, 4, 50])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("given", [True, False], ids=["jacobian", "products"])
def test_randomised_steps_solve_the_damped_problem(
    shape: tuple[int, int], rank: int, momentum: float, given: bool
) -> None:
    """Whatever the rank: min |J d + r|^2 + lambda |d - mu d_before|^2, by dense normal equations."""
    w, A, b = problem(shape)
    more: dict[str, Any] = {"jacobian": lambda _: A} if given else {}
    optimizer = NaturalGradient([w], damping=1e-3, rank=rank, momentum=momentum, rtol=1e-12, **more)
    system, before = A.T @ A + torch.eye(shape[1]).double() * 1e-3, torch.zeros(shape[1]).double()
    for _ in range(3):
        start = w.detach().clone()
        expected = torch.linalg.solve(system, 1e-3 * momentum * before - A.T @ (A @ start - b))
        optimizer.step(lambda: A @ w - b)
        torch.testing.assert_close(w.detach() - start, expected, rtol=1e-7, atol=1e-8)
        assert optimizer.last_step is not None
        assert "converged" in optimizer.last_step.solver
        before = expected


def test_the_sketch_saves_steps_and_belongs_to_the_seed() -> None:
    w, A, b = problem((9, 24))
    start, counts, ends = w.detach().clone(), [], []
    for rank, seed in ((1, 0), (6, 0), (6, 0), (6, 1)):
        w.data.copy_(start)
        optimizer = NaturalGradient([w], damping=1e-6, rank=rank, rtol=1e-3, jacobian=lambda _: A, seed=seed)
        optimizer.step(lambda: A @ w - b)
        assert optimizer.last_step is not None
        counts.append(int(optimizer.last_step.solver.split()[0]))
        ends.append(w.detach().clone())
    assert counts[1] < counts[0]
    assert torch.equal(ends[1], ends[2])
    assert not torch.equal(ends[1], ends[3])


def test_randomised_steps_on_an_equation() -> None:
    """u' = cos x, u(0) = 0, by products through PointwiseResiduals: one step as the direct solution takes it."""
    points = torch.linspace(0, 3, 12, dtype=torch.float64)[:, None]
    ends = []
    for rank in (None, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        terms = [
            (lambda u, x: torch.func.jacrev(u)(x)[0, 0] - torch.cos(x[0]), points),
            (lambda u, x: u(x)[0], torch.zeros(1, 1, dtype=torch.float64)),
        ]
        residuals = PointwiseResiduals(model, terms)
        NaturalGradient(model.parameters(), damping=1e-4, rank=rank, rtol=1e-11).step(residuals)
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"rank": 2.0}, "rank must be an integer >= 1"),
        ({"rank": 3, "damping": 0.0}, "needs damping > 0"),
        ({"rank": 3, "loss": nn.functional.mse_loss}, "belong to residuals"),
    ],
)
def test_bad_ranks_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        NaturalGradient([nn.Parameter(torch.ones(2))], **settings)


def test_the_preconditioner_is_definite_in_float32() -> None:
    """A sketch of all of J J', which nothing but rounding is left of, under a damping far below rounding."""
    g = torch.Generator().manual_seed(0)
    A, b = torch.randn(60, 200, generator=g), torch.randn(60, generator=g)
    w = nn.Parameter(torch.zeros(200))
    NaturalGradient([w], damping=1e-6, rank=100).step(lambda: A @ w - b)
    expected = torch.linalg.pinv(A.double()) @ b.double()
    torch.testing.assert_close(w.detach().double(), expected, rtol=0, atol=1e-4 * float(expected.norm()))
    smooth = A @ torch.diag(torch.logspace(2, -2, 200))
    NaturalGradient([w], damping=1e-10, rank=55).step(lambda: smooth @ w - b)


def test_states_from_before_there_was_a_rank_go_on() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = NaturalGradient([w])
    optimizer.step(lambda: 1 * w)
    state = optimizer.state_dict()
    del state["param_groups"][0]["rank"]
    again = NaturalGradient([w])
    again.load_state_dict(state)
    again.step(lambda: 1 * w)
    assert again.param_groups[0]["rank"] is None
