"""Gauss-Newton on batches: against dense matrices, its preconditioner, damping, refusals, conventions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvature.errors import InputError
from curvature.linalg import cg
from optimizers import GaussNewton, check_optimizer
from optimizers.kronecker.layers import remembered_layers
from optimizers.kronecker.preconditioner import LayerPreconditioner
from optimizers.newton.flat import FlatParams
from tests.optimizers.problems import Problem, mlp

SOLVED: dict[str, Any] = {"iterations": 200, "rtol": 1e-13, "damping": 0.03, "warm_start": 0.0, "tolerance": math.inf}


def normed(seed: int = 0) -> Problem:
    """With layer normalisation and a parameter that no known layer uses."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
            self.power = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(self.inner(x))).abs() ** self.power)

    return Problem(Net(), torch.randn(12, 3), torch.randint(0, 3, (12,)))


def dense(problem: Problem, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Return the gradient over all rows, and the Gauss-Newton matrix of some."""
    names = [name for name, _ in problem.model.named_parameters()]
    x = problem.x[rows]

    def outputs(theta: Tensor) -> Tensor:
        return functional_call(problem.model, dict(zip(names, problem.split(theta), strict=True)), (x,))

    J = jacrev(outputs)(problem.flat())
    p = outputs(problem.flat()).softmax(1).detach()
    H = [torch.diag(q) - torch.outer(q, q) for q in p]
    return problem.dense()[0], sum(j.T @ h @ j for j, h in zip(J, H, strict=True)) / len(x)


@pytest.mark.parametrize("problem", [mlp, normed])
@pytest.mark.parametrize("part", [slice(None), slice(0, 5)])
def test_one_system_against_dense_matrices(problem: Any, part: slice) -> None:
    p = problem()
    g, G = dense(p, part)
    before = p.flat()
    GaussNewton(p.params, loss=F.cross_entropy, **SOLVED).step(p.pair, None if part == slice(None) else p.pair_of(part))
    expected = -torch.linalg.solve(G + 0.03 * torch.eye(len(g), dtype=g.dtype), g)
    torch.testing.assert_close(p.flat() - before, expected, rtol=1e-8, atol=1e-10)


def test_a_system_a_layer_against_dense_blocks() -> None:
    p = normed()
    g, G = dense(p)
    before, expected = p.flat(), torch.zeros_like(g)
    sizes = dict(
        zip(
            [name for name, _ in p.model.named_parameters()],
            torch.arange(len(g)).split([q.numel() for q in p.params]),
            strict=True,
        )
    )
    for names in (
        ("power",),
        ("inner.weight", "inner.bias"),
        ("norm.weight",),
        ("norm.bias",),
        ("head.weight", "head.bias"),
    ):
        at = torch.cat([sizes[name] for name in names])
        expected[at] = -torch.linalg.solve(G[at][:, at] + 0.03 * torch.eye(len(at), dtype=g.dtype), g[at])
    optimizer = GaussNewton(p.model.named_parameters(), loss=F.cross_entropy, blocks="layer", **SOLVED)
    optimizer.step(p.pair)
    torch.testing.assert_close(p.flat() - before, expected, rtol=1e-8, atol=1e-10)
    assert optimizer.uncovered() == {"power": "no layer that has factors uses it"}


def test_preconditioner_is_the_inverse_of_its_dense_blocks() -> None:
    p = normed()
    optimizer = GaussNewton(p.params, loss=F.cross_entropy, damping=0.1)
    for _ in range(3):
        optimizer.step(p.pair)
    flat = FlatParams(p.params)
    states = [optimizer.state[q] for q in p.params]
    layers = list(dict.fromkeys(remembered_layers(states).values()))
    P = LayerPreconditioner(flat, layers, states, 0.1)
    inverse = P @ torch.eye(flat.n, dtype=flat.dtype)
    starts = dict(enumerate(torch.arange(flat.n).split(flat.sizes)))
    blocks = torch.zeros_like(inverse)
    for layer in layers:
        state = states[layer.main]
        L, R = (torch.diag(t[0]) if t.ndim == 2 else t[0] for t in (state["left"], state["right"]))
        at = torch.cat([starts[i].view(len(L), -1) for i in layer.members], 1).reshape(-1)
        Q = [
            state.get(f"{side}_basis", torch.eye(n, dtype=flat.dtype)[None])[0]
            for side, n in (("left", len(L)), ("right", len(R)))
        ]
        K = torch.kron(*Q) @ torch.diag(state["spread"].reshape(-1)) @ torch.kron(*Q).T  # of the last refresh
        blocks[at[:, None], at] = torch.linalg.inv(K + 0.1 * torch.eye(len(at), dtype=flat.dtype))
    (own,) = (i for i, state in enumerate(states) if "diagonal" in state)
    blocks[starts[own], starts[own]] = 1 / (states[own]["diagonal"] + 0.1)
    torch.testing.assert_close(inverse, blocks, rtol=1e-9, atol=1e-10)


def test_a_few_preconditioned_iterations_come_closer_than_plain_ones() -> None:
    """The model's distance from its minimum after 4 steps, on inputs of different sizes, once factors are averages."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    p = Problem(net, torch.randn(60, 6) * torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0, 30.0]), torch.randint(0, 3, (60,)))
    settings = {**SOLVED, "iterations": 4, "damping": 1e-3, "damping_rule": None}
    optimizer = GaussNewton(p.params, 0.0, loss=F.cross_entropy, **settings)
    for _ in range(16):  # the parameters stay
        optimizer.step(p.pair)
    optimizer.param_groups[0]["lr"] = 1.0
    g, G = dense(p)
    A, start = G + 1e-3 * torch.eye(len(g), dtype=g.dtype), p.flat()
    optimizer.step(p.pair)
    best = -torch.linalg.solve(A, g)
    gaps = [float((d - best) @ A @ (d - best)) for d in (p.flat() - start, cg(A, -g, max_iterations=4).x)]
    assert gaps[0] < 0.5 * gaps[1]


def test_damping_follows_the_ratio_and_steps_that_raise_the_loss_are_not_taken() -> None:
    p = mlp()
    g, G = dense(p)
    before = p.flat()
    optimizer = GaussNewton(p.params, 0.5, loss=F.cross_entropy, **SOLVED)
    optimizer.step(p.pair)
    d = p.flat() - before
    step = optimizer.last_step
    assert step is not None
    torch.testing.assert_close(step.model_decrease, -float(g @ d + d @ G @ d / 2), rtol=1e-8, atol=0)
    torch.testing.assert_close(step.loss_after, float(p.closure().detach()), rtol=1e-12, atol=0)
    assert step.ratio > 0.75
    assert optimizer.param_groups[0]["damping"] == 0.015

    p = mlp()
    before = p.flat()
    optimizer = GaussNewton(p.params, 200.0, loss=F.cross_entropy, damping=1e-3)
    optimizer.step(p.pair)
    assert torch.equal(p.flat(), before)
    assert optimizer.last_step is not None
    assert not optimizer.last_step.accepted
    assert optimizer.param_groups[0]["damping"] == 2e-3


@pytest.mark.parametrize("blocks", ["all", "layer"])
def test_damping_adapts_where_groups_have_rates_of_their_own(blocks: str) -> None:
    p = mlp()
    _, G = dense(p)
    before = p.flat()
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(p.closure(), p.params)])
    groups = [{"params": p.params[:3], "lr": 0.2}, {"params": p.params[3:], "lr": 0.1}]
    optimizer = GaussNewton(groups, loss=F.cross_entropy, blocks=blocks, **SOLVED)  # type: ignore[arg-type]
    optimizer.step(p.pair)
    d = p.flat() - before
    if blocks == "layer":
        at = sum(q.numel() for q in p.params[:2])
        G[:at, at:] = G[at:, :at] = 0
    step = optimizer.last_step
    assert step is not None
    torch.testing.assert_close(step.model_decrease, -float(g @ d + d @ G @ d / 2), rtol=1e-8, atol=0)
    assert step.ratio > 0.75
    assert optimizer.param_groups[0]["damping"] == SOLVED["damping"] * 0.5


def test_an_infinite_tolerance_takes_a_step_from_a_loss_of_zero() -> None:
    p = mlp()
    offset = p.closure().detach()
    optimizer = GaussNewton(p.params, 200.0, loss=lambda z, y: F.cross_entropy(z, y) - offset, tolerance=torch.inf)
    optimizer.step(p.pair)
    assert optimizer.last_step is not None
    assert optimizer.last_step.loss_before == 0
    assert optimizer.last_step.accepted


def test_refuses_what_it_cannot_do() -> None:
    p = mlp()
    with pytest.raises(InputError, match="loss="):
        GaussNewton(p.params)
    for wrong in ({"blocks": "half"}, {"iterations": 0}, {"damping": 0.0}, {"tolerance": -1.0}, {"warm_start": 2.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            GaussNewton(p.params, loss=F.cross_entropy, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="split between model and loss"):
        GaussNewton(p.params, loss=F.cross_entropy).step(p.closure)


@pytest.mark.parametrize("settings", [{}, {"blocks": "layer", "warm_start": 0.0}])
def test_keeps_the_conventions_of_torch(settings: dict[str, Any]) -> None:
    skip = {"maximize": "a Gauss-Newton matrix is that of a minimum"}
    report = check_optimizer(GaussNewton, form="outputs", settings=settings, skip=skip)
    assert report.passed, str(report)
