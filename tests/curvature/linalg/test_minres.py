"""MINRES: dense solutions of indefinite systems, the shortest least-squares solution of singular ones."""

from __future__ import annotations

import math

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError, NotConvergedError
from curvature.linalg import DiagonalPreconditioner, minres
from curvature.linop import Counting
from curvature.results.estimates import Status
from tests.matrices import F64, generator, spectra, with_spectrum

N = 60
SINGULAR = ["clustered", "repeated", "mostly negative", "many null", "rank one"]


def columns(k: int = 5, n: int = N, seed: int = 3) -> Tensor:
    return torch.randn(n, k, generator=generator(seed), dtype=F64)


def pseudo_inverse(A: Tensor) -> Tensor:
    return torch.linalg.pinv(A, hermitian=True, rtol=1e-10)


@pytest.mark.parametrize(
    "name", ["flat", "polynomial", "slow exponential", "step", "indefinite", "outliers over a bulk"]
)
def test_dense_solutions(name: str) -> None:
    A, B = with_spectrum(spectra(N)[name]), columns()
    counted = Counting(A)
    result = minres(counted, B, rtol=1e-10)
    assert result.status is Status.CONVERGED
    exact = torch.linalg.solve(A, B)
    torch.testing.assert_close(result.x, exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))
    torch.testing.assert_close(result.residual_norms, (B - A @ result.x).norm(dim=0), rtol=0.1, atol=1e-13)
    assert result.num_matvecs == counted.num_matvecs
    assert result.gradient_norms is None


@pytest.mark.parametrize("damping", [-0.3, 0.7])
def test_shifts_of_either_sign(damping: float) -> None:
    A, B = with_spectrum(spectra(N)["indefinite"]), columns()
    result = minres(A, B, damping=damping, rtol=1e-10).raise_if_failed()
    exact = torch.linalg.solve(A + damping * torch.eye(N, dtype=F64), B)
    torch.testing.assert_close(result.x, exact, rtol=1e-7, atol=1e-7 * float(exact.abs().max()))


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_systems_in_their_range(name: str) -> None:
    A = with_spectrum(spectra(N)[name])
    B = A @ columns()
    result = minres(A, B, rtol=1e-10)
    assert result.status is Status.CONVERGED
    exact = pseudo_inverse(A) @ B
    torch.testing.assert_close(result.x, exact, rtol=0, atol=1e-7 * float(exact.abs().max()))


@pytest.mark.parametrize("name", SINGULAR)
def test_the_shortest_least_squares_solution_outside_the_range(name: str) -> None:
    A, B = with_spectrum(spectra(N)[name]), columns()
    counted = Counting(A)
    result = minres(counted, B, rtol=1e-10)
    assert set(result.statuses) == {Status.LEAST_SQUARES}
    assert result.num_matvecs == counted.num_matvecs
    exact = pseudo_inverse(A) @ B
    torch.testing.assert_close(result.x, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    torch.testing.assert_close(result.residual_norms, (B - A @ exact).norm(dim=0), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.residual_norms, (B - A @ result.x).norm(dim=0), rtol=1e-10, atol=0)
    assert result.gradient_norms is not None
    assert bool((result.gradient_norms <= 2e-8 * A.norm() * result.residual_norms).all())
    assert not bool(result.converged.any())
    with pytest.raises(NotConvergedError, match="x minimises the residual instead"):
        result.raise_if_failed()


def test_with_a_start_the_least_squares_solution_nearest_to_it() -> None:
    A, b = with_spectrum(spectra(N)["many null"]), columns(1)[:, 0]
    x0 = columns(1, seed=8)[:, 0]
    result = minres(A, b, x0=x0, rtol=1e-10)
    nearest = x0 + pseudo_inverse(A) @ (b - A @ x0)
    torch.testing.assert_close(result.x, nearest, rtol=0, atol=1e-8)


def test_columns_of_every_kind_side_by_side_end_as_they_do_alone() -> None:
    A, B = with_spectrum(spectra(N)["many null"]), columns()
    B[:, 1] = A @ B[:, 1]
    B[:, 2] = 0
    B[:, 3] *= 1e-25
    together = minres(A, B, rtol=1e-9)
    for i, status in enumerate(["LEAST_SQUARES", "CONVERGED", "CONVERGED", "LEAST_SQUARES", "LEAST_SQUARES"]):
        alone = minres(A, B[:, i], rtol=1e-9)
        assert alone.status.name == together.statuses[i].name == status
        assert alone.x.shape == (N,)
        torch.testing.assert_close(alone.x, together.x[:, i], rtol=0, atol=1e-8 * float(B[:, i].norm()))
    assert together.gradient_norms is not None
    assert together.gradient_norms.isnan().tolist() == [False, True, True, False, False]


def test_residuals_are_the_least_of_every_krylov_space() -> None:
    A, b = with_spectrum(spectra(N)["indefinite"]), columns(1)[:, 0]
    history = minres(A, b, rtol=1e-12, max_iterations=10).residual_history
    K = [b]
    for m in range(1, 11):
        Q = torch.linalg.qr(torch.stack(K, dim=1))[0]
        least = torch.linalg.lstsq(A @ Q, b[:, None], driver="gelsd").solution
        torch.testing.assert_close(history[m], (b - (A @ Q @ least)[:, 0]).norm(), rtol=1e-8, atol=0)
        K.append(A @ Q[:, -1])


def test_no_more_products_than_scipy_for_the_same_residual() -> None:
    for name in ("flat", "slow exponential", "indefinite", "outliers over a bulk"):
        A, b = with_spectrum(spectra(N)[name]), columns(1)[:, 0]
        result = minres(A, b, rtol=1e-8)
        short, _ = scipy.sparse.linalg.minres(A.numpy(), b.numpy(), rtol=1e-15, maxiter=result.num_matvecs - 3)
        assert (b - A @ torch.tensor(short)).norm() > 1e-8 * b.norm(), name


def test_preconditioned_systems() -> None:
    scales = torch.logspace(0, 8, N, dtype=F64)
    signs = torch.where(torch.arange(N) % 3 == 0, -1.0, 1.0).to(F64)
    A = scales.sqrt()[:, None] * with_spectrum(torch.linspace(1, 2, N, dtype=F64) * signs) * scales.sqrt()
    B = columns()
    result = minres(A, B, rtol=1e-8, preconditioner=DiagonalPreconditioner(scales))
    assert result.status is Status.CONVERGED
    assert max(result.num_iterations) < 60
    assert bool(((B - A @ result.x).norm(dim=0) <= 1e-8 * B.norm(dim=0)).all())
    torch.testing.assert_close(result.x, torch.linalg.solve(A, B), rtol=0, atol=1e-6)


def test_preconditioned_least_squares_are_those_of_its_norm() -> None:
    A, b = with_spectrum(spectra(N)["many null"]), columns(1)[:, 0]
    p = torch.linspace(1, 3, N, dtype=F64)
    result = minres(A, b, rtol=1e-10, preconditioner=DiagonalPreconditioner(p))
    assert result.status is Status.LEAST_SQUARES
    weighted = A / p.sqrt()[:, None]
    exact = torch.linalg.lstsq(weighted, (b / p.sqrt())[:, None], driver="gelsd", rcond=1e-10).solution[:, 0]
    torch.testing.assert_close(A @ result.x, A @ exact, rtol=0, atol=1e-6)


# -- the edges --------------------------------------------------------------------------------------------------------


def test_limits_and_rounding() -> None:
    A, B = with_spectrum(spectra(N)["indefinite"]), columns(2)
    short = minres(A, B, rtol=1e-10, max_iterations=4)
    assert set(short.statuses) == {Status.MAX_ITERATIONS}
    torch.testing.assert_close(short.residual_norms, (B - A @ short.x).norm(dim=0))
    assert set(minres(A, B, max_iterations=0).statuses) == {Status.MAX_ITERATIONS}
    below = minres(with_spectrum(spectra(N)["flat"]), B, rtol=1e-17)
    assert set(below.statuses) <= {Status.STAGNATED, Status.LEAST_SQUARES}
    assert not bool(below.converged.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    A, b = with_spectrum(torch.cat([torch.linspace(1, 3, 40), torch.linspace(-2, -1, 20)])).to(dtype), columns(1)[:, 0]
    rtol = 1e-4 if dtype == torch.float32 else 3e-2
    result = minres(A, b.float(), rtol=rtol)
    assert result.status is Status.CONVERGED
    exact = torch.linalg.solve(A.double(), b)
    assert float((result.x.double() - exact).norm() / exact.norm()) < 2 * rtol


def test_small_and_empty() -> None:
    assert minres(torch.full((1, 1), -4.0), torch.tensor([2.0])).x.tolist() == [-0.5]
    zero = minres(torch.zeros(3, 3), torch.ones(3))
    assert zero.status is Status.LEAST_SQUARES
    assert zero.x.tolist() == [0.0, 0.0, 0.0]
    assert minres(torch.zeros(3, 3), torch.zeros(3)).status is Status.CONVERGED
    multiple = minres(-2 * torch.eye(5, dtype=F64), columns(3, 5))
    assert multiple.num_iterations == (1, 1, 1)
    torch.testing.assert_close(multiple.x, columns(3, 5) / -2)


def test_bad_input() -> None:
    A, b = torch.eye(4, dtype=F64), torch.ones(4, dtype=F64)
    with pytest.raises(InputError, match=r"null_rtol must be in \(0, 1\), got 0"):
        minres(A, b, null_rtol=0)
    with pytest.raises(InputError, match="must be symmetric positive definite"):
        minres(A, b, preconditioner=-A)
    with pytest.raises(InputError, match="must be symmetric positive definite"):
        minres(torch.diag(torch.tensor([1, 2, 3, 4], dtype=F64)), b, preconditioner=torch.diag(A[0] * 3 - 1))
    A[1, 1] = math.inf
    with pytest.raises(NonFiniteError, match="product 1 with the operator"):
        minres(A, b)


# -- where rounding is in the way -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("kind", ["outlier", "negative outlier", "Hilbert", "graded"])
def test_least_squares_is_claimed_of_what_was_multiplied_and_never_worse_than_the_start(
    kind: str, dtype: torch.dtype
) -> None:
    bulk = torch.linspace(0, 1, 99, dtype=F64)
    top = 1e6 if dtype is F64 else 1e3
    i = torch.arange(60, dtype=F64)
    A = {
        "outlier": with_spectrum(torch.cat([torch.tensor([top], dtype=F64), bulk])),
        "negative outlier": with_spectrum(torch.cat([torch.tensor([-top], dtype=F64), bulk])),
        "Hilbert": 1 / (i[:30, None] + i[:30] + 1),
        "graded": with_spectrum(10.0 ** (-16 * i / 59)),
    }[kind].to(dtype)
    b = torch.randn(len(A), generator=generator(7), dtype=F64).to(dtype)
    result = minres(A, b)
    r = b.double() - A.double() @ result.x.double()
    eps, norm = torch.finfo(dtype).eps, float(torch.linalg.matrix_norm(A.double(), 2))
    assert float(r.norm()) <= 1.001 * float(b.double().norm())
    torch.testing.assert_close(
        float(result.residual_norms), float(r.norm()), rtol=1e-2, atol=100 * eps * norm * float(result.x.norm())
    )
    if result.status is Status.LEAST_SQUARES:
        slope = float((A.double() @ r).norm())
        assert slope <= 2 * eps**0.5 * norm * float(r.norm())
        assert result.gradient_norms is not None
        assert float(result.gradient_norms) == pytest.approx(slope, rel=0.5, abs=100 * eps * norm**2 * float(r.norm()))
    else:
        assert result.status in (Status.STAGNATED, Status.MAX_ITERATIONS)
    if kind.endswith("outlier") and dtype is F64:  # one zero eigenvalue: what b has of it stays
        assert result.status is Status.LEAST_SQUARES
        best = b - A @ (torch.linalg.pinv(A, hermitian=True, rtol=1e-10) @ b)
        assert float(result.residual_norms) == pytest.approx(float(best.norm()), rel=1e-6)
    if kind == "Hilbert" and dtype is F64:
        assert float(result.residual_norms) < 0.9 * float(b.norm())
