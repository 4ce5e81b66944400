"""Preconditioned matrices, and the preconditioners that optimizers carry, against the steps they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import (
    GGNOperator,
    HessianOperator,
    Objective,
    ParameterSpace,
    PreconditionedOperator,
    optimizer_divisor,
)
from curvature.errors import InputError
from curvature.linalg import eigsh
from optimizers import AdaHessian
from tests.cases import BY_NAME
from tests.checks import assert_close, check_operator

EXACT = 1e-10
F64 = torch.float64
Make = Callable[[Any], torch.optim.Optimizer]


def problem(seed: int = 0) -> tuple[nn.Module, Objective]:
    torch.manual_seed(seed)
    case = BY_NAME["MLP tanh"]
    model = case.model()
    return model, Objective(model, case.loss, case.data())


def train(objective: Objective, optimizer: torch.optim.Optimizer) -> None:
    g = objective.space.to_dict(objective.gradient())
    for name, p in objective.space.tensors.items():
        p.grad = g[name].clone()
    optimizer.step()


# -- the matrix -------------------------------------------------------------------------------------------------------


def test_product_agrees_with_dense_matrix(generator: torch.Generator) -> None:
    _, objective = problem()
    d = torch.rand(objective.num_params, generator=generator, dtype=F64) + 0.1
    H = HessianOperator(objective)
    root = d.rsqrt()
    A = PreconditionedOperator(H, d)
    dense = root[:, None] * H.to_dense() * root
    check_operator(A, dense, generator, EXACT)
    check_operator(PreconditionedOperator(dense, torch.ones_like(d)), dense, generator, EXACT)
    block = objective.space.block(["0", "4.bias"])
    check_operator(A.restrict(block), block.take(block.take(dense).T), generator, EXACT)
    inner = objective.space.block("4.bias")
    check_operator(A.restrict(block).restrict("4.bias"), inner.take(inner.take(dense).T), generator, EXACT)


def test_eigenvalues_of_a_quadratic_and_vectors_in_its_parameters(generator: torch.Generator) -> None:
    """1/2 sum_i h_i w_i^2 with P = diag p has the preconditioned eigenvalues h_i / p_i and the axes for vectors."""
    h = torch.tensor([4.0, 9.0, 0.5, 2.0], dtype=F64)
    p = torch.tensor([8.0, 3.0, 0.1, 2.0], dtype=F64)
    pairs = eigsh(PreconditionedOperator(torch.diag(h), p), 2, rtol=1e-12, generator=generator)
    assert_close(pairs.eigenvalues, torch.tensor([5.0, 3.0], dtype=F64), EXACT)
    U = PreconditionedOperator(torch.diag(h), p).unscale(pairs.eigenvectors)
    assert_close(torch.diag(h) @ U, p[:, None] * U * pairs.eigenvalues, 1e-9)
    assert_close(U[:, 0], PreconditionedOperator(torch.diag(h), p).unscale(pairs.eigenvectors[:, 0]), EXACT)
    assert int(U[:, 0].abs().argmax()) == 2


# -- what optimizers divide by: the step they take is -lr P^-1 m ------------------------------------------------------

BETA1 = 0.6
OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(BETA1, 0.9), eps=1e-3),
    "Adam, fresh": lambda p: torch.optim.Adam(p, lr=1e-9, betas=(0.9, 0.999), eps=1e-8),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(BETA1, 0.9), eps=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(BETA1, 0.9), eps=1e-3, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.8, eps=1e-3),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.8, eps=1e-3, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-3),
    "Adagrad, decay": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.3, eps=1e-3, initial_accumulator_value=0.2),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "AdaHessian": lambda p: AdaHessian(p, lr=0.01, betas=(BETA1, 0.9), eps=1e-3),
    "AdaHessian, power": lambda p: AdaHessian(p, lr=0.01, betas=(BETA1, 0.9), eps=1e-3, hessian_power=0.5),
    "AdaHessian, rare": lambda p: AdaHessian(p, lr=0.01, betas=(BETA1, 0.9), eps=1e-3, update_every=3),
    "AdaHessian, by steps": lambda p: AdaHessian(
        p, lr=0.01, betas=(BETA1, 0.9), eps=1e-3, update_every=3, bias_correction="steps"
    ),
    "AdaHessian, repeated": lambda p: AdaHessian(
        p, lr=0.01, betas=(BETA1, 0.9), eps=1e-3, update_every=3, stale="repeat"
    ),
}


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_last_step_was_minus_lr_times_inverse_times_average_of_gradients(name: str, steps: int) -> None:
    model, objective = problem()
    optimizer = OPTIMIZERS[name](model.parameters())
    case = BY_NAME["MLP tanh"]
    x, y = case.data()
    for _ in range(steps):
        before, gradient = objective.space.current(), objective.gradient()
        if isinstance(optimizer, AdaHessian):
            optimizer.step(lambda: case.loss(model(x), y))
        else:
            train(objective, optimizer)
    m = gradient
    if "exp_avg" in next(iter(optimizer.state.values()), {}):
        m = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in model.parameters()])
    moved = objective.space.current() - before
    P = optimizer_divisor(optimizer, objective.space)
    assert P.dtype == objective.dtype
    lr = optimizer.param_groups[0]["lr"]
    assert_close(-m / P * lr, moved, 1e-6 if "fresh" in name else 1e-9)  # w + 1e-9 keeps few digits of the step
    assert_close(optimizer_divisor(optimizer, objective.space, include_lr=True), P / lr, EXACT)


def test_state_of_other_implementations_of_adahessian_is_read() -> None:
    """Public ones hold `step` as a number and have no count of refreshes."""

    class Foreign(torch.optim.Optimizer):
        pass

    w = nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = Foreign([w], {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1.0, "hessian_power": 0.5})
    optimizer.state[w] = {"step": 2, "exp_hessian_diag_sq": torch.tensor([7.0, 0.0], dtype=F64)}
    P = optimizer_divisor(optimizer, ParameterSpace({"w": w}))
    assert_close(P, 0.75 * torch.tensor([16**0.25 + 1, 1.0], dtype=F64), EXACT)  # 7 / (1 - 0.75^2) = 16


def test_preconditioned_sharpness_decides_on_stability_as_published() -> None:
    """On h w^2 / 2 Adam with a frozen v is stable below (2 + 2 beta1) / ((1 - beta1) lr), and not above."""
    beta1 = 0.9
    for factor, stable in ((0.98, True), (1.02, False)):
        h, sqrt_v = 3.0, 2.0
        lr = factor * (2 + 2 * beta1) / (1 - beta1) * sqrt_v / h
        w, m = 1.0, 0.0
        for _ in range(3000):
            m = beta1 * m + (1 - beta1) * h * w
            w -= lr * m / sqrt_v
        P = torch.tensor([sqrt_v], dtype=F64)
        sharpness = float(PreconditionedOperator(torch.tensor([[h]], dtype=F64), P).to_dense())
        assert (sharpness < 38 / lr) == stable
        assert (abs(w) < 1) == stable


def test_groups_ties_and_blocks(generator: torch.Generator) -> None:
    model = BY_NAME["tied weights"].model()
    x, y = BY_NAME["tied weights"].data()
    loss = BY_NAME["tied weights"].loss
    groups = [{"params": model.get_submodule("mix").parameters()}, {"params": [model.embedding.weight], "lr": 0.3}]
    optimizer = torch.optim.RMSprop(groups, lr=0.1)
    loss(model(x), y).backward()
    optimizer.step()
    objective = Objective(model, loss, (x, y))
    H = HessianOperator(objective)
    A = PreconditionedOperator.from_optimizer(H, optimizer, include_lr=True)
    v = {name: optimizer.state[p]["square_avg"] for name, p in objective.space.tensors.items()}
    lr = {name: 0.3 if name == "embedding.weight" else 0.1 for name in v}
    P = objective.space.to_flat({name: (v[name].sqrt() + 1e-8) / lr[name] for name in v})
    check_operator(A, P.rsqrt()[:, None] * H.to_dense() * P.rsqrt(), generator, EXACT)
    of_block = PreconditionedOperator.from_optimizer(H.restrict("mix"), optimizer, include_lr=True)
    check_operator(of_block, A.restrict("mix").to_dense(), generator, EXACT)
    G = PreconditionedOperator.from_optimizer(GGNOperator(objective), optimizer)
    assert G.shape == H.shape


# -- parameters without state, and refusals ---------------------------------------------------------------------------


def test_parameters_that_were_not_moved() -> None:
    case = BY_NAME["frozen and unused"]
    model = case.model()
    objective = Objective(model, case.loss, case.data())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"has not moved 'unused.weight'"):
        optimizer_divisor(optimizer, objective.space)
    case.loss(model(case.data()[0]), case.data()[1]).backward()
    optimizer.step()
    with pytest.raises(InputError, match=r"has not moved 'unused.weight'"):
        optimizer_divisor(optimizer, objective.space)
    P = objective.space.to_dict(optimizer_divisor(optimizer, objective.space, missing="identity"))
    assert torch.equal(P["unused.weight"], torch.ones(2, 3, dtype=F64))
    assert not torch.equal(P["head.weight"], torch.ones(3, 4, dtype=F64))
    P = objective.space.to_dict(optimizer_divisor(optimizer, objective.space, missing="exclude"))
    assert bool(P["unused.weight"].isinf().all())
    assert bool(P["head.weight"].isfinite().all())
    partly = torch.optim.Adagrad(model.get_submodule("head").parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"does not hold 'unused.weight'"):
        optimizer_divisor(partly, objective.space)
    with pytest.raises(InputError, match=r"has not moved 'head.weight'"):  # its state is there before the first step
        optimizer_divisor(partly, objective.restrict("head").space)
    P = objective.space.to_dict(optimizer_divisor(optimizer, objective.space, missing="identity", include_lr=True))
    assert_close(P["unused.bias"], torch.full((2,), 10.0, dtype=F64), EXACT)


def test_fresh_adahessian_has_no_preconditioner_yet() -> None:
    model, objective = problem()
    with pytest.raises(InputError, match=r"has not moved '0.weight'"):
        optimizer_divisor(AdaHessian(model.parameters()), objective.space)


def test_what_cannot_be_read_is_refused() -> None:
    model, objective = problem()
    H, n = HessianOperator(objective), objective.num_params
    other = torch.optim.Adadelta(model.parameters())
    with pytest.raises(InputError, match=r"preconditioner of Adadelta is not known: known are Adam, .*AdaHessian"):
        PreconditionedOperator.from_optimizer(H, other)
    with pytest.raises(InputError, match=r"must be a torch.optim.Optimizer, got str"):
        optimizer_divisor("adam", objective.space)
    with pytest.raises(InputError, match=r"missing must be 'error', 'identity' or 'exclude', got 'skip'"):
        optimizer_divisor(other, objective.space, missing="skip")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"needs a matrix of an objective.*got Scaled"):
        PreconditionedOperator.from_optimizer(2 * H, other)  # type: ignore[arg-type]
    ones = torch.ones(n, dtype=F64)
    with pytest.raises(InputError, match=r"restrict needs a matrix of an objective, got Scaled"):
        PreconditionedOperator(2 * H, ones).restrict("0")
    with pytest.raises(InputError, match=rf"must have shape \({n},\), got \(3,\)"):
        PreconditionedOperator(H, torch.ones(3))
    with pytest.raises(InputError, match=r"needs a square matrix, got shape \(2, 3\)"):
        PreconditionedOperator(torch.ones(2, 3), torch.ones(2))
    for bad in (0.0, -1.0, float("nan")):
        d = ones.clone()
        d[5] = bad
        with pytest.raises(InputError, match=rf"got {bad} in entry 5 \(1 of {n} are not\)"):
            PreconditionedOperator(H, d)


def test_matrix_of_zeros(generator: torch.Generator) -> None:
    d = torch.tensor([2.0, 3.0], dtype=F64)
    A = PreconditionedOperator(torch.zeros(2, 2, dtype=F64), d)
    assert torch.equal(A.to_dense(), torch.zeros(2, 2, dtype=F64))
    assert float(eigsh(A, 1, generator=generator).eigenvalues) == 0
    x: Tensor = torch.ones(1, dtype=F64)
    assert float(PreconditionedOperator(torch.full((1, 1), 6.0, dtype=F64), 2 * x) @ x) == pytest.approx(3.0)
