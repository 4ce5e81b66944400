"""SOAP against a plain loop written from the paper; spikes, ill-conditioned factors, precision, micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.errors import InputError
from optimizers import SOAP
from optimizers.kronecker.eigen import eigenbasis, improved_basis
from tests.optimizers.problems import convolutional, mlp


def adam(m: Tensor, v: Tensor, t: int, b1: float, b2: float, eps: float) -> Tensor:
    return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


def plain_soap(
    weights: list[Tensor], gradients: list[list[Tensor]], every: int, first: int, start: str
) -> list[Tensor]:
    """Algorithm 3 of the paper, one matrix at a time; refreshes by QR (its Algorithm 4), columns sorted."""
    lr, wd, (b1, b2), eps = 0.02, 0.1, (0.9, 0.95), 1e-8
    ends = []
    for W, gs in zip(weights, gradients, strict=True):
        W, shape = W.reshape(len(W), -1).clone(), W.shape
        n, k = W.shape
        L, R, QL, QR = torch.zeros(n, n).to(W), torch.zeros(k, k).to(W), torch.eye(n).to(W), torch.eye(k).to(W)
        M, V = torch.zeros_like(W), torch.zeros_like(W)  # M in the original basis, as in the paper
        for step, G in enumerate(gs, start=1):
            G = G.reshape(n, k)
            t = step - (start == "gradient")
            if t > 0:
                M = b1 * M + (1 - b1) * G
                V = b2 * V + (1 - b2) * (QL.T @ G @ QR) ** 2
                W = W - lr * (QL @ adam(QL.T @ M @ QR, V, t, b1, b2, eps) @ QR.T + wd * W)
            else:
                W = W - lr * wd * W
            L, R = b2 * L + (1 - b2) * G @ G.T, b2 * R + (1 - b2) * G.T @ G
            if t == 0:
                QL, QR = torch.linalg.eigh(L)[1].flip(1), torch.linalg.eigh(R)[1].flip(1)
            elif step <= first or t % every == 0:
                oL, oR = (QL.T @ L @ QL).diagonal().argsort().flip(0), (QR.T @ R @ QR).diagonal().argsort().flip(0)
                V = V[oL][:, oR]
                QL, QR = torch.linalg.qr(L @ QL[:, oL])[0], torch.linalg.qr(R @ QR[:, oR])[0]
        ends.append(W.reshape(shape))
    return ends


def random_run(shapes: list[tuple[int, ...]], steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    scales = [torch.rand(s, generator=g, dtype=torch.float64) for s in shapes]
    return weights, [[torch.randn(s.shape, generator=g, dtype=torch.float64) * s for _ in range(steps)] for s in scales]


def ours(weights: list[Tensor], gradients: list[list[Tensor]], **settings: Any) -> list[Tensor]:
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = SOAP(params, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), eigen_dtype="float64", **settings)
    for step in range(len(gradients[0])):
        for p, gs in zip(params, gradients, strict=True):
            p.grad = gs[step].clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("start", ["identity", "gradient"])
def test_it_is_the_papers_loop(start: str, foreach: bool | None) -> None:
    weights, gradients = random_run([(4, 5), (5, 4), (3, 2, 2, 1)], 13)  # else rounding picks null vectors
    expected = plain_soap(weights, gradients, 4, 3, start)
    found = ours(weights, gradients, update_every=4, update_first=3, start=start, foreach=foreach)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_large_sides_have_no_factor_or_are_cut() -> None:
    """One factor: Adam in the basis of one side. Blocks: each is a matrix of its own."""
    (W,), (gs,) = random_run([(4, 6)], 9)
    tall = SOAP([p := nn.Parameter(W.clone())], max_dim=5)
    p.grad = gs[0]
    tall.step()
    assert {n for n in tall.state[p] if "." in n} == {"left.0", "basis.left.0"}
    rows, columns = (slice(0, 2), slice(2, 4)), (slice(0, 3), slice(3, 6))
    parts = [(r, c) for r in rows for c in columns]
    expected = plain_soap([W[i] for i in parts], [[g[i] for g in gs] for i in parts], 4, 3, "identity")
    (found,) = ours([W], [gs], update_every=4, update_first=3, max_dim=3, large="blocks")
    for i, part in zip(parts, expected, strict=True):
        torch.testing.assert_close(found[i], part, rtol=1e-9, atol=1e-10)


def test_eigenbases_of_bad_factors() -> None:
    """Orthogonal, of the right eigenvalues, with 16 decades between them, rank 1, zero, equal, tiny and huge ones."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(24, 24, generator=g, dtype=torch.float64))[0]
    decades = (Q * torch.logspace(0, -16, 24, dtype=torch.float64)) @ Q.T
    one = Q[:, :1] @ Q[:, :1].T
    for factor in (decades, one, 0 * one, torch.eye(24).double(), 1e-30 * decades, 1e30 * decades):
        small = factor.float()
        for dtype in (torch.float32, torch.float64):
            found = eigenbasis(small, dtype)
            assert found is not None
            values, basis = found
            wanted = torch.linalg.eigvalsh(factor).flip(0).clamp(min=0)
            scale = float(wanted.max()) or 1.0
            assert float((values - wanted).abs().max()) < 1e-5 * scale
            assert bool((values[:-1] >= values[1:]).all())
            improved = improved_basis(small, basis, dtype)
            assert improved is not None
            for q in (basis, improved[0]):
                assert float((q.T @ q - torch.eye(24)).abs().max()) < 1e-5
    assert eigenbasis(torch.full((3, 3), torch.nan), torch.float32) is None
    assert improved_basis(torch.full((3, 3), torch.inf), torch.eye(3), torch.float32) is None


def test_a_failing_solver_is_asked_again_in_float64_and_then_the_basis_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    solver, asked = torch.linalg.eigh, []

    def failing(matrix: Tensor) -> Any:
        asked.append(matrix.dtype)
        if len(asked) < 3 or len(asked) > 3:
            raise torch.linalg.LinAlgError("did not converge")
        return solver(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    factor = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    found = eigenbasis(factor, torch.float32)
    assert found is not None
    assert asked == [torch.float32, torch.float64, torch.float64]
    torch.testing.assert_close(found[0], torch.tensor([3.0, 2.0, 1.0]))
    assert eigenbasis(factor, torch.float32) is None
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = SOAP([p], refresh="eigh")
    p.grad = factor.clone()
    optimizer.step()
    assert torch.equal(optimizer.state[p]["basis.left.0"], torch.eye(3))


@pytest.mark.parametrize("refresh", ["qr", "continuous", "eigh"])
def test_a_spike_of_the_gradient_is_survived(refresh: str) -> None:
    """1e6 times the gradient at one step: bases stay orthogonal, the loss stays what it was and goes on falling."""
    problem = mlp()
    problem.model.float()
    x, y = problem.x.float(), problem.y
    optimizer = SOAP(problem.params, lr=0.01, refresh=refresh, update_every=5, update_first=3)
    losses = []
    for step in range(240):
        optimizer.zero_grad()
        loss = F.cross_entropy(problem.model(x), y)
        losses.append(float(loss.detach()))
        loss.backward()
        for p in problem.params:
            if step == 20 and p.grad is not None:
                p.grad.mul_(1e6)
        optimizer.step()
    for state in optimizer.state.values():
        for name, basis in state.items():
            if name.startswith("basis"):
                assert float((basis.T @ basis - torch.eye(len(basis))).abs().max()) < 1e-5
    assert losses[25] < 1.2 * losses[20]
    assert losses[-1] < 0.95 * losses[20]  # Adam, too, goes slowly until its averages have forgotten


def test_overflown_factors_start_anew() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    optimizer = SOAP([p], update_every=1)
    p.grad = torch.full((3, 3), 1e25)
    with pytest.warns(UserWarning, match="clip gradients"):
        optimizer.step()
    assert float(optimizer.state[p]["left.0"].abs().sum()) == 0
    with pytest.raises(InputError, match="factor_beta"):
        SOAP([p], factor_beta=1.0)


@pytest.mark.parametrize("refresh", ["qr", "continuous"])
def test_micro_batches_and_the_joined_batch(refresh: str) -> None:
    """2 x 16 against 1 x 32 on digits, 25 steps: a continuous refresh keeps them together, sorted columns do not."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16

    def update(num_parts: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))
        optimizer = SOAP(model.parameters(), refresh=refresh)
        for step in range(25):
            before = [p.detach().clone() for p in model.parameters()]
            rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:32]
            optimizer.zero_grad()
            for part in rows.chunk(num_parts):
                (F.cross_entropy(model(x[part]), y[part]) / num_parts).backward()
            optimizer.step()
        return torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])

    joined, parts = update(1), update(2)
    difference = float((joined - parts).norm() / joined.norm())
    assert difference < 1e-4 if refresh == "continuous" else difference > 1e-2


def test_products_are_taken_in_full_precision_whatever_is_set() -> None:
    seen = []
    optimizer = SOAP((problem := convolutional()).params)
    original = optimizer._directions

    def watched(routed: Any) -> list[Tensor]:
        settings = [torch._C._get_fp32_precision_getter(backend, "matmul") for backend in ("cuda", "mkldnn")]
        seen.append((*settings, torch.is_autocast_enabled("cpu")))
        return original(routed)

    optimizer._directions = watched  # type: ignore[method-assign]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        problem.closure().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(seen) == 1
    assert not {"tf32", "bf16", True} & set(seen[0])


@pytest.mark.parametrize("size", [255, 256, 513, 1100])
def test_large_factors_are_what_small_ones_are(size: int) -> None:
    """Sides of 256 and more are added up by halves."""
    g = torch.randn(size, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = nn.Parameter(torch.zeros(size, 7, dtype=torch.float64))
    optimizer = SOAP([p], update_first=1, update_every=9)
    for scale in (1.0, 2.0):
        p.grad = scale * g
        optimizer.step()
    factor = optimizer.state[p]["left.0"]
    torch.testing.assert_close(factor, (0.95 * 0.05 + 0.05 * 4) * g @ g.T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 3, 256])
@pytest.mark.parametrize("n", [128, 256, 512])
def test_the_next_basis_is_that_of_plain_orthogonal_iteration(n: int, rank: int) -> None:
    """Sides of a multiple of 256 are decomposed beside an identity."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(n, min(rank, n), generator=g, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    found = improved_basis(rows @ rows.T, basis, torch.float64)
    assert found is not None
    Q, order = found
    assert order is not None
    torch.testing.assert_close(Q.T @ Q, torch.eye(n).double(), rtol=0, atol=1e-13)
    product = rows @ rows.T @ basis[:, order]
    leading = min(rank, n)
    own = Q[:, :leading] @ Q[:, :leading].T  # a projection does not depend on signs
    theirs = torch.linalg.qr(product[:, :leading]).Q
    torch.testing.assert_close(own, theirs @ theirs.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_takes_the_steps_of_its_authors_code(decay: float) -> None:
    """At equal settings, where soap.py of github.com/nikhilvyas/SOAP is on the path, to float32's rounding.

    Square matrices: their first factors are of full rank, so that the bases are unique but for signs. Ours decays
    weights with the first gradient too, which takes no other step.
    """
    theirs = pytest.importorskip("soap")
    weights, gradients = random_run([(6, 6), (12, 12)], 35)
    weights = [w.float() for w in weights]
    ends = []
    for make, share in (
        (lambda p: SOAP(p, lr=0.01, weight_decay=decay, start="gradient", update_first=1), 1.0),
        (lambda p: theirs.SOAP(p, lr=0.01, weight_decay=decay, precondition_frequency=10), 1 - 0.01 * decay),
    ):
        params = [nn.Parameter(w * share) for w in weights]
        optimizer = make(params)
        for step in range(35):
            for p, gs in zip(params, gradients, strict=True):
                p.grad = gs[step].float()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    moved = (ends[1] - torch.cat([w.flatten() for w in weights])).norm()
    assert float((ends[0] - ends[1]).norm()) < 1e-3 * float(moved)
