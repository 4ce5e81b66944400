from __future__ import annotations

import pytest
import torch

from curvature.errors import InputError, NonFiniteError
from curvature.linalg import eigsh, lobpcg
from curvature.linop import Counting
from curvature.results.estimates import Status
from tests.matrices import F64, generator, orthogonal, spectra, true_residuals, wanted, with_spectrum

N = 120


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("name", spectra(N))
def test_it_agrees_with_a_dense_solver(name: str, which: str) -> None:
    A = with_spectrum(spectra(48)[name])
    scale = float(torch.linalg.matrix_norm(A, 2))
    pairs = lobpcg(
        A,
        6,
        which=which,  # type: ignore[arg-type]
        rtol=1e-7,
        atol=1e-4 * scale,  # the low ends of some are out of reach without a preconditioner
        generator=generator(),
    )
    assert pairs.status is Status.CONVERGED
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 6, which), rtol=0, atol=1e-4 * max(scale, 1e-3))
    torch.testing.assert_close(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(6, dtype=F64), rtol=0, atol=1e-12)
    assert bool((true_residuals(A, pairs) <= 1.01 * pairs.residual_norms + 1e-12 * scale).all())


def test_residuals_are_true_at_loose_tolerance_and_products_are_counted() -> None:
    for certify in (False, True):
        A = Counting(with_spectrum(spectra(N)["flat"]))
        pairs = lobpcg(A, 4, rtol=1e-2, generator=generator(3), certify=certify)
        torch.testing.assert_close(pairs.residual_norms, true_residuals(A.A, pairs), rtol=1e-6, atol=1e-12)
        assert pairs.num_matvecs == A.num_matvecs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_operators(dtype: torch.dtype) -> None:
    A = with_spectrum(spectra(N)["outliers over a bulk"]).to(dtype)
    rtol = 1e-4 if dtype is torch.float32 else 3e-2
    pairs = lobpcg(A, 3, rtol=rtol, generator=generator(), certify=True)
    assert pairs.eigenvalues.dtype == torch.float32
    assert pairs.status is Status.CONVERGED
    exact = wanted(A, 3, "LA").float()
    assert bool(((pairs.eigenvalues - exact).abs() <= 2 * rtol * exact).all())


def test_a_preconditioner_makes_the_low_end_cheap() -> None:
    n = 400
    laplacian = 2 * torch.eye(n, dtype=F64) - torch.diag(torch.ones(n - 1, dtype=F64), 1)
    laplacian = laplacian - torch.diag(torch.ones(n - 1, dtype=F64), -1)
    inverse = torch.linalg.inv(laplacian + 1e-5 * torch.eye(n, dtype=F64))
    settings = {"which": "SA", "rtol": 1e-4, "confidence": None, "max_matvecs": 2000}
    plain = lobpcg(laplacian, 3, generator=generator(), **settings)  # type: ignore[arg-type]
    helped = lobpcg(laplacian, 3, generator=generator(), preconditioner=inverse, **settings)  # type: ignore[arg-type]
    assert helped.status is Status.CONVERGED
    sought = lobpcg(laplacian, 3, generator=generator(), preconditioner=inverse, **{**settings, "confidence": 0.99})  # type: ignore[arg-type]
    assert sought.status is Status.UNCERTIFIED  # the chain has no preconditioner and stops at what the iteration cost
    assert sought.num_matvecs <= 2 * helped.num_matvecs + 3
    assert sought.miss_probability > 0.01
    assert helped.num_matvecs < 0.1 * plain.num_matvecs
    torch.testing.assert_close(helped.eigenvalues, wanted(laplacian, 3, "SA"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", [lobpcg, eigsh])
def test_tracking_the_top_eigenvalue_takes_a_few_products_a_step(solver: object) -> None:
    eigenvalues, Q = spectra(N)["outliers over a bulk"], orthogonal(N)
    skew = torch.randn(N, N, generator=generator(1), dtype=F64) / N**0.5
    vector, spent = None, 0
    for t in torch.linspace(0, 1, 101, dtype=F64):
        V = torch.matrix_exp(t * (skew - skew.T)) @ Q  # the eigenvectors turn, the eigenvalues grow
        A = (V * ((1 + t) * eigenvalues)) @ V.T
        pair = solver(A, 1, rtol=0.05, generator=generator(), v0=vector, confidence=None)  # type: ignore[operator]
        # a residual of 5 % is an eigenvalue to 0.5 %: |residual|^2 / gap
        exact = wanted(A, 1, "LA")
        assert abs(pair.eigenvalues - exact) < 0.01 * exact
        vector = pair.eigenvectors
        spent += pair.num_matvecs
    assert spent <= 3 * 101


def test_one_pair_more_notices_what_has_overtaken() -> None:
    A = torch.diag(torch.cat([torch.tensor([3.0, 2.0], dtype=F64), torch.linspace(0, 1, N - 2, dtype=F64)]))
    old = torch.eye(N, dtype=F64)[:, 1:2]  # the second eigenvector
    assert lobpcg(A, 1, generator=generator(), v0=old, confidence=None).eigenvalues == 2.0
    sought = lobpcg(A, 1, generator=generator(), v0=old)
    torch.testing.assert_close(sought.eigenvalues, torch.tensor([3.0], dtype=F64), rtol=1e-5, atol=0)
    start = torch.cat([old, torch.randn(N, 1, generator=generator(), dtype=F64)], dim=1)
    pairs = lobpcg(A, 2, generator=generator(), v0=start)
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([3.0, 2.0], dtype=F64), rtol=1e-5, atol=0)


def test_the_budget_is_kept_and_small_matrices_work() -> None:
    A = Counting(with_spectrum(spectra(N)["flat"]))
    pairs = lobpcg(A, 5, rtol=1e-10, generator=generator(), max_matvecs=33)
    assert pairs.num_matvecs == A.num_matvecs == 33
    assert pairs.status is Status.MAX_MATVECS
    assert not bool(pairs.converged.all())
    assert lobpcg(torch.tensor([[-3.0]]), 1, generator=generator()).eigenvalues.item() == -3.0
    full = lobpcg(with_spectrum(torch.linspace(-1, 1, 12, dtype=F64)), 12, rtol=1e-10, generator=generator())
    torch.testing.assert_close(full.eigenvalues, torch.linspace(1, -1, 12, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be in \[1, 120\], got 0"),
        ({"which": "LM"}, "which must be one of LA, SA, got 'LM'; for the others take eigsh"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"max_matvecs": 2}, "max_matvecs must be at least 3, to multiply the start once, got 2"),
        ({"max_matvecs": 5, "certify": True}, "max_matvecs must be at least 6"),
        ({"v0": torch.ones(7)}, r"v0 must be a vector \(120,\) or a block"),
        ({"preconditioner": torch.eye(3)}, r"preconditioner must have shape \(120, 120\), got \(3, 3\)"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"k": 3, "generator": generator(), **arguments}
    with pytest.raises(InputError, match=message):
        lobpcg(with_spectrum(spectra(N)["flat"]), **settings)  # type: ignore[arg-type]


def test_products_that_are_not_finite_are_named() -> None:
    with pytest.raises(NonFiniteError, match="product 2"):
        lobpcg(torch.full((5, 5), torch.nan), 2, generator=generator())
