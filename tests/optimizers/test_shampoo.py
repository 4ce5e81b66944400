"""Shampoo against a plain loop written from the papers, with every graft, sums and averages, blocks, late starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.errors import InputError
from optimizers import Shampoo
from tests.optimizers.problems import mlp
from tests.optimizers.test_soap import random_run

LR, WD, B1, B2, EPS = 0.02, 0.1, 0.9, 0.95, 1e-8


def inverse_root(A: Tensor, exponent: float, damping: float) -> Tensor:
    values, Q = torch.linalg.eigh(A)
    return Q @ torch.diag((values.clamp(min=0) + damping * values.max()) ** -exponent) @ Q.T


def plain_shampoo(
    W: Tensor, gradients: list[Tensor], *, graft: str | None, factors: str, every: int, first: int, start: int
) -> Tensor:
    shape, W = W.shape, W.reshape(len(W), -1).clone()
    n, k = W.shape
    L, R, M, V = (torch.zeros(s, dtype=W.dtype) for s in ((n, n), (k, k), (n, k), (n, k)))
    for t, G in enumerate(gradients, start=1):
        G = G.reshape(n, k)
        M, V = B1 * M + (1 - B1) * G, B2 * V + (1 - B2) * G**2
        if factors == "sum":
            L, R, correction = L + G @ G.T, R + G.T @ G, 1.0
        else:
            L, R, correction = B2 * L + (1 - B2) * G @ G.T, B2 * R + (1 - B2) * G.T @ G, 1 - B2**t
        if t <= first or t % every == 0:
            left, right = (inverse_root(A / correction, 0.25, 1e-4) for A in (L, R))
        m, root = M / (1 - B1**t), (V / (1 - B2**t)).sqrt() + EPS
        A = {"adamw": m / root, "rmsprop": G / root, "sgd": m, None: m}[graft]
        U = left @ m @ right
        if t < start:
            U = A
        elif graft is not None:
            U = U * A.norm() / U.norm()
        W = W - LR * (U + WD * W)
    return W.reshape(shape)


def ours(weights: list[Tensor], gradients: list[list[Tensor]], **settings: Any) -> list[Tensor]:
    params = [nn.Parameter(w.clone()) for w in weights]
    settings = {"damping": 1e-4, "eigen_dtype": "float64", "update_every": 4, "update_first": 2, **settings}
    optimizer = Shampoo(params, lr=LR, weight_decay=WD, betas=(B1, B2), eps=EPS, **settings)
    for step in range(len(gradients[0])):
        for p, gs in zip(params, gradients, strict=True):
            p.grad = gs[step].clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("factors", ["ema", "sum"])
@pytest.mark.parametrize("graft", ["adamw", "rmsprop", "sgd", None])
def test_it_is_the_papers_loop(graft: Any, factors: Any) -> None:
    weights, gradients = random_run([(4, 6), (5, 3), (3, 2, 2, 2)], 11)
    for start, foreach in ((1, None), (4, False)):
        found = ours(weights, gradients, graft=graft, factors=factors, start_step=start, foreach=foreach)
        for a, W, gs in zip(found, weights, gradients, strict=True):
            b = plain_shampoo(W, gs, graft=graft, factors=factors, every=4, first=2, start=start)
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_large_sides_have_no_factor_or_are_cut() -> None:
    (W,), (gs,) = random_run([(4, 6)], 9)
    rows, columns = (slice(0, 2), slice(2, 4)), (slice(0, 3), slice(3, 6))
    (found,) = ours([W], [gs], max_dim=3, large="blocks")
    for i in [(r, c) for r in rows for c in columns]:
        part = plain_shampoo(
            W[i], [g[i] for g in gs], graft="adamw", factors="ema", every=4, first=2, start=1
        )  # a matrix of its own, the length of its step as well
        torch.testing.assert_close(found[i], part, rtol=1e-8, atol=1e-10)
    G = gs[0]
    (one,) = ours([W], [[G]], max_dim=5, graft=None)  # exponent 1/2 on the left alone
    expected = W - LR * (inverse_root(G @ G.T, 0.5, 1e-4) @ G + WD * W)
    torch.testing.assert_close(one, expected, rtol=1e-8, atol=1e-10)
    (other,) = ours([W], [[G]], graft=None, exponent=0.5)
    both = inverse_root(G @ G.T, 0.5, 1e-4) @ G @ inverse_root(G.T @ G, 0.5, 1e-4)
    torch.testing.assert_close(other, W - LR * (both + WD * W), rtol=1e-8, atol=1e-10)


def test_settings_are_checked() -> None:
    p = [nn.Parameter(torch.ones(2, 2))]
    for settings, message in (
        ({"graft": "adam"}, "graft"),
        ({"exponent": 0.0}, "exponent"),
        ({"factors": "mean"}, "factors"),
        ({"start_step": 0}, "start_step"),
        ({"damping": -1.0}, "damping"),
    ):
        with pytest.raises(InputError, match=message):
            Shampoo(p, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("graft", "every"), [("adamw", 10), ("rmsprop", 10), (None, 1)])
def test_a_spike_of_the_gradient_is_survived(graft: Any, every: int) -> None:
    problem = mlp()
    problem.model.float()
    x, y = problem.x.float(), problem.y
    optimizer = Shampoo(problem.params, lr=0.01, graft=graft, update_every=every)
    losses = []
    for step in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(problem.model(x), y)
        losses.append(float(loss.detach()))
        loss.backward()
        for p in problem.params:
            if step == 20 and p.grad is not None:
                p.grad.mul_(1e6)
        optimizer.step()
    assert all(bool(t.isfinite().all()) for state in optimizer.state.values() for t in state.values())
    assert losses[25] < 1.2 * losses[20]
    assert losses[-1] < 0.95 * losses[20]


@pytest.mark.parametrize("graft", ["adamw", "rmsprop", "sgd", None])
@pytest.mark.parametrize("resumes", [True, False])
def test_the_first_gradient_after_zeros_counts(graft: Any, resumes: bool) -> None:
    """A gated layer: roots are taken from its first gradients, as they would be in the first steps of a run."""
    torch.manual_seed(0)
    gradients = [torch.zeros(3, 2)] * 4 + [torch.randn(3, 2) for _ in range(5)]
    ends = []
    for first in (2, len(gradients)):  # the reference renews roots in every step
        p = nn.Parameter(torch.zeros(3, 2))
        optimizer = Shampoo([p], lr=0.1, graft=graft, weight_decay=0.0, update_first=first, update_every=100)
        for t, g in enumerate(gradients[:6]):
            if resumes and t in (3, 5):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            p.grad = g.clone()
            optimizer.step()
            assert bool(p.any()) == (t >= 4)
        ends.append(p.detach().clone())
    assert torch.equal(*ends)
    assert float(ends[0].norm()) < 1.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graft", ["adamw", "sgd", None])
def test_it_takes_the_steps_of_metas(graft: Any) -> None:
    """At equal settings, where github.com/facebookresearch/optimizers is on the path, to float32's rounding."""
    meta = pytest.importorskip("distributed_shampoo")
    weights, gradients = random_run([(4, 4), (8, 5)], 12)
    weights = [w.float() for w in weights]
    lengths = {
        "adamw": meta.AdamPreconditionerConfig(beta2=B2, epsilon=EPS),
        "sgd": meta.SGDPreconditionerConfig(),
        None: None,
    }
    common: dict[str, Any] = {"lr": LR, "betas": (B1, B2), "weight_decay": WD}
    ends = []
    for make in (
        lambda p: Shampoo(p, **common, eps=EPS, graft=graft, damping=1e-10, update_every=1),
        lambda p: meta.DistributedShampoo(
            p,
            **common,
            epsilon=1e-12,
            precondition_frequency=1,
            start_preconditioning_step=1,
            grafting_config=lengths[graft],
            distributed_config=meta.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
        ),
    ):
        params = [nn.Parameter(w.clone()) for w in weights]
        optimizer = make(params)
        for step in range(12):
            for p, gs in zip(params, gradients, strict=True):
                p.grad = gs[step].float()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    moved = (ends[0] - torch.cat([w.flatten() for w in weights])).norm()
    assert float((ends[0] - ends[1]).norm()) < 1e-4 * float(moved)
