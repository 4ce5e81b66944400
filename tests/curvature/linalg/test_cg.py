"""Conjugate gradients: dense solutions, counted products, directions of negative curvature, rules for optimizers."""

from __future__ import annotations

import math

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError, NotConvergedError
from curvature.linalg import DiagonalPreconditioner, RelativeProgress, cg
from curvature.linop import Counting
from curvature.results.estimates import Status
from tests.matrices import F64, generator, spectra, with_spectrum

N = 60


def columns(k: int = 5, n: int = N, seed: int = 3) -> Tensor:
    return torch.randn(n, k, generator=generator(seed), dtype=F64)


def residuals(A: Tensor, X: Tensor, B: Tensor, damping: float = 0.0) -> Tensor:
    return (B - A @ X - damping * X).norm(dim=0)


@pytest.mark.parametrize("name", spectra(N))
def test_dense_solutions_of_damped_systems(name: str) -> None:
    eigenvalues = spectra(N)[name]
    A, B = with_spectrum(eigenvalues), columns()
    damping = 0.1 - min(float(eigenvalues.min()), 0.0)
    counted = Counting(A)
    result = cg(counted, B, damping=damping, rtol=1e-11)
    assert result.status is Status.CONVERGED
    exact = torch.linalg.solve(A + damping * torch.eye(N, dtype=F64), B)
    torch.testing.assert_close(result.x, exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))
    torch.testing.assert_close(result.residual_norms, residuals(A, result.x, B, damping), rtol=0.1, atol=1e-13)
    assert bool((result.residual_norms <= 1e-11 * B.norm(dim=0)).all())
    assert result.num_matvecs == counted.num_matvecs


def test_a_block_is_its_columns() -> None:
    A, B = with_spectrum(spectra(N)["flat"]), columns()
    B[:, 1] = A @ torch.linalg.eigh(A)[1][:, -1]  # solved in a step
    B[:, 2] = 0
    B[:, 4] *= 1e-25
    together = cg(A, B, damping=0.01, rtol=1e-10)
    assert len(set(together.num_iterations)) > 2
    assert together.num_iterations[2] == 0
    assert not bool(together.x[:, 2].any())
    for i, b in enumerate(B.T):
        alone = cg(A, b, damping=0.01, rtol=1e-10)
        assert alone.x.shape == (N,)
        assert alone.residual_norms.shape == alone.converged.shape == ()
        assert alone.num_iterations[0] == together.num_iterations[i]
        torch.testing.assert_close(alone.x, together.x[:, i], rtol=1e-9, atol=1e-12 * float(alone.x.abs().max()))
        m = alone.num_iterations[0] + 1
        torch.testing.assert_close(alone.residual_history, together.residual_history[i, :m], rtol=1e-6, atol=1e-15)
        assert bool(together.residual_history[i, m:].isnan().all())


def test_columns_leave_the_products_when_they_are_solved() -> None:
    U = torch.linalg.eigh(with_spectrum(spectra(N)["flat"]))[1]
    A = Counting(with_spectrum(spectra(N)["flat"]))
    B = torch.stack([U[:, :m].sum(dim=1) for m in (1, 2, 5)], dim=1)  # Krylov spaces of 1, 2 and 5 dimensions
    result = cg(A, B, rtol=1e-9)
    assert result.num_iterations == (1, 2, 5)
    assert result.num_matvecs == A.num_matvecs == 1 + 2 + 5 + 3


def test_as_many_steps_as_distinct_eigenvalues() -> None:
    for distinct in (1, 2, 7):
        A = with_spectrum((torch.arange(N) % distinct + 1).to(F64))
        assert cg(A, columns(1)[:, 0], rtol=1e-10).num_iterations == (distinct,)


def test_no_more_products_than_scipy() -> None:
    for name in ("flat", "polynomial", "slow exponential", "step"):
        A, b = with_spectrum(spectra(N)[name]), columns(1)[:, 0]
        counted = Counting(A)
        scipy.sparse.linalg.cg(counted.to_scipy(), b.numpy(), rtol=1e-8)
        assert cg(A, b, rtol=1e-8).num_matvecs <= counted.num_matvecs + 2, name


@pytest.mark.parametrize("name", ["many null", "rank one", "clustered"])
def test_the_shortest_solution_of_a_singular_system_in_its_range(name: str) -> None:
    A = with_spectrum(spectra(N)[name])
    B = A @ columns()
    result = cg(A, B, rtol=1e-11)
    assert result.status is Status.CONVERGED
    exact = torch.linalg.pinv(A, hermitian=True, rtol=1e-10) @ B
    torch.testing.assert_close(result.x, exact, rtol=0, atol=1e-7 * float(exact.abs().max()))


@pytest.mark.parametrize("name", ["many null", "rank one", "clustered", "zero"])
def test_a_singular_system_outside_its_range_ends_with_a_null_direction(name: str) -> None:
    A = with_spectrum(spectra(N)[name])
    result = cg(A, columns(), rtol=1e-8)
    assert set(result.statuses) == {Status.NEGATIVE_CURVATURE}
    assert not bool(result.converged.any())
    assert result.direction is not None
    assert float((A @ result.direction).norm(dim=0).max()) < 1e-6 * max(float(A.norm()), 1.0)
    with pytest.raises(NotConvergedError, match=r"0 of 5 right-hand sides .* add damping, or use minres"):
        result.raise_if_failed()


def test_a_direction_of_negative_curvature_comes_back_with_its_curvature() -> None:
    A, B = with_spectrum(spectra(N)["outliers over a bulk"]), columns()
    A = A + 0.1 * torch.eye(N, dtype=F64)
    definite = torch.linalg.eigh(A)[1][:, -3:].sum(dim=1)
    B[:, 1] = definite
    result = cg(A, B, rtol=1e-9)
    assert result.statuses[1] is Status.CONVERGED
    assert result.direction is not None
    assert result.curvature is not None
    assert bool(result.curvature[1].isnan())
    assert not bool(result.direction[:, 1].any())
    for i in (0, 2, 3, 4):
        d = result.direction[:, i]
        assert result.statuses[i] is Status.NEGATIVE_CURVATURE
        assert result.curvature[i] < 0
        torch.testing.assert_close(result.curvature[i], d @ A @ d, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(d.norm(), torch.tensor(1.0, dtype=F64))
        assert d @ B[:, i] > 0  # downhill for the model


def test_ill_conditioned_systems_with_a_preconditioner() -> None:
    scales = torch.logspace(0, 8, N, dtype=F64)
    A = scales.sqrt()[:, None] * with_spectrum(torch.linspace(1, 2, N, dtype=F64)) * scales.sqrt()
    assert torch.linalg.cond(A) > 1e8
    B = A @ columns()
    preconditioner = DiagonalPreconditioner(A.diagonal())
    result = cg(A, B, rtol=1e-12, preconditioner=preconditioner)
    assert result.status is Status.CONVERGED
    assert max(result.num_iterations) < 40
    better = cg(A, B, rtol=1e-13, preconditioner=preconditioner, x0=result.x)
    torch.testing.assert_close(better.x, columns(), rtol=0, atol=1e-4)  # rounding of B: 1e-16 x 1e8, and n
    torch.testing.assert_close(result.x, torch.linalg.solve(A, B), rtol=0, atol=1e-3)


def test_it_equals_cg_in_the_variables_of_the_preconditioner() -> None:
    A, b = with_spectrum(spectra(N)["flat"]), columns(1)[:, 0]
    P = with_spectrum(torch.linspace(0.5, 4, N, dtype=F64), seed=5)
    values, U = torch.linalg.eigh(P)
    root = (U * values**-0.5) @ U.T
    steps = 6
    result = cg(A, b, preconditioner=torch.linalg.inv(P), rtol=1e-12, max_iterations=steps)
    inner = cg(root @ A @ root, root @ b, rtol=1e-12, max_iterations=steps)
    torch.testing.assert_close(result.x, root @ inner.x, rtol=1e-9, atol=1e-11)
    assert result.status is inner.status is Status.MAX_ITERATIONS


def test_each_iterate_minimises_the_model_over_its_krylov_space() -> None:
    A, b = with_spectrum(spectra(N)["polynomial"]), columns(1)[:, 0]
    result = cg(A, b, rtol=1e-12, max_iterations=8, reorthogonalise=True)
    K = [b]
    for m in range(1, 9):
        Q = torch.linalg.qr(torch.stack(K, dim=1))[0]
        x = Q @ torch.linalg.solve(Q.T @ A @ Q, Q.T @ b)
        assert result.model_history is not None
        torch.testing.assert_close(result.model_history[m], x @ A @ x / 2 - b @ x, rtol=1e-9, atol=0)
        torch.testing.assert_close(result.residual_history[m], (b - A @ x).norm(), rtol=1e-7, atol=0)
        K.append(A @ Q[:, -1])


def test_starts() -> None:
    A, B = with_spectrum(spectra(N)["flat"]), columns()
    exact = torch.linalg.solve(A, B)
    result = cg(A, B, rtol=1e-10, x0=exact)
    assert result.num_iterations == (0,) * 5
    assert result.num_matvecs == 5
    near = exact + 1e-3 * columns(seed=9)
    warm, cold = cg(A, B, rtol=1e-10, x0=near), cg(A, B, rtol=1e-10)
    assert max(warm.num_iterations) < min(cold.num_iterations)
    torch.testing.assert_close(warm.x, exact, rtol=1e-9, atol=1e-10)
    B[:, 2] = 0
    assert not bool(cg(A, B, x0=near).x[:, 2].any())
    assert warm.model_history is not None
    model = (near * (A @ near)).sum(dim=0) / 2 - (columns() * near).sum(dim=0)
    torch.testing.assert_close(warm.model_history[:, 0], model)


def test_residuals_below_rounding_are_said_not_to_be_reached() -> None:
    A, B = with_spectrum(spectra(N)["slow exponential"]), columns()
    result = cg(A, B, rtol=1e-17)
    assert set(result.statuses) == {Status.STAGNATED}
    torch.testing.assert_close(result.residual_norms, residuals(A, result.x, B), rtol=0.3, atol=0)
    short = cg(A, B, rtol=1e-10, max_iterations=3)
    assert set(short.statuses) == {Status.MAX_ITERATIONS}
    torch.testing.assert_close(short.residual_norms, residuals(A, short.x, B), rtol=1e-9, atol=0)
    none = cg(A, B, max_iterations=0)
    assert set(none.statuses) == {Status.MAX_ITERATIONS}
    assert not bool(none.x.any())


def test_reorthogonalised_residuals_stay_orthogonal_so_that_n_steps_do() -> None:
    A, B = with_spectrum(torch.logspace(0, -9, N, dtype=F64)), columns(3)
    assert max(cg(A, B, rtol=1e-5, max_iterations=4 * N).num_iterations) > 1.5 * N
    result = cg(A, B, rtol=1e-5, reorthogonalise=True)
    assert result.status is Status.CONVERGED
    assert max(result.num_iterations) <= N


# -- for optimizers ---------------------------------------------------------------------------------------------------


def test_relative_progress_is_martens_rule() -> None:
    A, B = with_spectrum(spectra(N)["polynomial"]), columns(2)
    rule = RelativeProgress(rtol=1e-3, min_steps=5)
    result = cg(A, B, rtol=1e-14, stop=rule)
    assert set(result.statuses) == {Status.STOPPED}
    assert result.status.ok
    assert result.model_history is not None
    for phi, steps in zip(result.model_history.tolist(), result.num_iterations, strict=True):
        for i in range(1, steps + 1):
            k = max(5, i // 10)
            assert (i > k and phi[i] < 0 and (phi[i] - phi[i - k]) / phi[i] < k * 1e-3) == (i == steps), i


def test_kept_iterates_are_those_of_shorter_runs() -> None:
    A, B = with_spectrum(spectra(N)["slow exponential"]), columns(2)
    result = cg(A, B, rtol=1e-9, keep=1.5)
    schedule = sorted({math.ceil(1.5**j) for j in range(20)})
    assert [kept.step for kept in result.kept] == [s for s in schedule if s <= max(result.num_iterations)]
    for kept in result.kept[:6]:
        torch.testing.assert_close(kept.x, cg(A, B, rtol=1e-9, max_iterations=kept.step).x, rtol=1e-9, atol=1e-12)


# -- the edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_and_sizes_whose_squares_leave_their_range(dtype: torch.dtype, scale: float) -> None:
    A, b = with_spectrum(spectra(N)["flat"]).to(dtype), scale * columns(1)[:, 0].float()
    result = cg(A, b, rtol=1e-4 if dtype == torch.float32 else 3e-2)
    assert result.x.dtype == torch.float32
    assert result.status is Status.CONVERGED
    exact = torch.linalg.solve(A.double(), b.double())
    error = float((result.x.double() - exact).norm() / exact.norm())
    assert error < (1e-4 if dtype == torch.float32 else 5e-2)


def test_one_parameter_and_one_column() -> None:
    A = torch.full((1, 1), 4.0, dtype=F64)
    assert cg(A, torch.tensor([2.0], dtype=F64)).x.tolist() == [0.5]
    assert cg(A, torch.tensor([[2.0, -4.0, 0.0]], dtype=F64)).x.tolist() == [[0.5, -1.0, 0.0]]
    assert cg(-A, torch.tensor([2.0], dtype=F64)).status is Status.NEGATIVE_CURVATURE
    zero = cg(torch.zeros(3, 3), torch.zeros(3))
    assert zero.status is Status.CONVERGED
    assert zero.num_matvecs == 0


def test_products_that_are_not_finite_are_named() -> None:
    A = torch.eye(4, dtype=F64)
    A[2, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="product 1 with the operator"):
        cg(A, torch.ones(4, dtype=F64))
    with pytest.raises(NonFiniteError, match="product 1 with the operator"):
        cg(A, torch.ones(4, dtype=F64), x0=torch.ones(4, dtype=F64))


@pytest.mark.parametrize(
    ("B", "arguments", "message"),
    [
        (torch.ones(3, dtype=F64), {}, r"vector \(4,\) or a block \(4, k\), k >= 1, got \(3,\)"),
        (torch.ones(4, 0, dtype=F64), {}, "k >= 1"),
        (torch.tensor([1, 1, torch.inf, 1], dtype=F64), {}, "real and finite"),
        (torch.ones(4, dtype=F64), {"rtol": 0.0}, "rtol must be positive"),
        (torch.ones(4, dtype=F64), {"x0": torch.ones(4, 1)}, "x0 must have the shape of B"),
        (torch.ones(4, dtype=F64), {"max_iterations": -1}, "max_iterations must not be negative"),
        (torch.ones(4, dtype=F64), {"damping": math.nan}, "damping must be finite"),
        (torch.ones(4, dtype=F64), {"keep": 1.0}, "keep must be a finite growth factor above 1"),
        (torch.ones(4, dtype=F64), {"preconditioner": torch.eye(3)}, r"preconditioner must have shape \(4, 4\)"),
        (torch.ones(4, dtype=F64), {"preconditioner": -torch.eye(4, dtype=F64)}, "must be symmetric positive definite"),
    ],
)
def test_bad_input(B: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cg(torch.eye(4, dtype=F64), B, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("diagonal", "arguments", "message"),
    [
        (torch.tensor([1.0, -0.5]), {}, "must be positive and finite, got entries down to -0.5"),
        (torch.ones(2, 2), {}, r"real vector \(n,\), got shape \(2, 2\)"),
        (torch.ones(2), {"power": 0.0}, r"power must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_diagonals(diagonal: Tensor, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DiagonalPreconditioner(diagonal, **arguments)


def test_diagonal_preconditioners_apply_the_inverse_of_their_power() -> None:
    d = torch.tensor([1.0, 4.0, 9.0], dtype=F64)
    P = DiagonalPreconditioner(d, damping=7.0, power=0.5)
    torch.testing.assert_close(P.to_dense(), torch.diag((d + 7) ** -0.5))


def test_rules_refuse_settings_without_meaning() -> None:
    with pytest.raises(InputError, match="min_steps at least 1"):
        RelativeProgress(min_steps=0)


def test_results_turn_into_plain_values() -> None:
    result = cg(torch.eye(2), torch.tensor([3.0, 4.0]), keep=2.0)
    plain = result.to_dict()
    assert "x" not in plain
    assert plain["statuses"] == ["CONVERGED"]
    assert plain["residual_history"] == [5.0, 0.0]
    assert result.to_dict(arrays=True)["kept"] == [{"step": 1, "x": [3.0, 4.0]}]
