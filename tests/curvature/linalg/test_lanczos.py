from __future__ import annotations

import pytest
import torch

from curvature.errors import InputError, NonFiniteError
from curvature.linalg import lanczos, lanczos_runs, ritz
from curvature.linop import Counting
from tests.matrices import F64, generator, spectra, with_spectrum

N = 60


def start(n: int = N, seed: int = 7) -> torch.Tensor:
    return torch.randn(n, generator=generator(seed), dtype=F64)


@pytest.mark.parametrize("name", spectra(N))
def test_it_satisfies_the_defining_relation(name: str) -> None:
    A = with_spectrum(spectra(N)[name])
    K = lanczos(A, start(), num_steps=20)
    T = torch.diag(K.alpha) + torch.diag(K.beta, 1) + torch.diag(K.beta, -1)
    last = torch.zeros(len(K.alpha), dtype=F64)
    last[-1] = 1
    m = len(K.alpha)
    torch.testing.assert_close(
        A @ K.basis, K.basis @ T + K.residual[:, None] * last, rtol=0, atol=1e-12 * max(1.0, float(A.norm()))
    )
    torch.testing.assert_close(K.basis.T @ K.basis, torch.eye(m, dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(K.basis.T @ K.residual, torch.zeros(m, dtype=F64), rtol=0, atol=1e-12)
    assert K.num_matvecs == m


def test_it_stops_when_the_krylov_space_is_exhausted() -> None:
    for name, distinct in [("zero", 1), ("multiple of the identity", 1), ("rank one", 2), ("step", 2)]:
        K = lanczos(with_spectrum(spectra(N)[name]), start(), num_steps=30)
        assert K.breakdown, name
        assert K.num_matvecs == distinct, name
        assert K.residual_norm == 0, name


def test_it_finds_the_whole_spectrum_in_n_steps() -> None:
    eigenvalues = torch.linspace(-1, 2, 25, dtype=F64)
    K = lanczos(with_spectrum(eigenvalues), start(25), num_steps=25)
    assert K.breakdown
    torch.testing.assert_close(ritz(K)[0], eigenvalues, rtol=0, atol=1e-11)


def test_gauss_quadrature_is_exact_to_degree_2m_minus_1_and_no_further() -> None:
    a, m = torch.linspace(1, 100, 500, dtype=F64), 6
    v = start(500)
    K = lanczos(torch.diag(a), v, num_steps=m)
    nodes, S = ritz(K)
    weights = S[0].square()
    measure = (v / v.norm()).square()
    for degree in range(2 * m):
        exact = (measure * a**degree).sum()
        assert abs((weights * nodes**degree).sum() / exact - 1) < 1e-13, degree
    exact = (measure * a ** (2 * m)).sum()
    assert abs((weights * nodes ** (2 * m)).sum() / exact - 1) > 1e-9


def test_it_multiplies_once_a_step() -> None:
    A = Counting(with_spectrum(spectra(N)["flat"]))
    lanczos(A, start(), num_steps=13)
    assert A.num_matvecs == 13


def test_runs_side_by_side_are_those_of_single_vectors_each_ending_on_its_own() -> None:
    A = Counting(torch.diag(spectra(N)["flat"]))
    unit = torch.eye(N, dtype=F64)
    X = torch.stack([start(), unit[:, 3], unit[:, 5] + unit[:, 9]], dim=1)  # spaces of 60, 1 and 2 dimensions
    runs = lanczos_runs(A, X, num_steps=10)
    assert runs.breakdown == [False, True, True]
    assert runs.num_matvecs == A.num_matvecs == 10 + 1 + 2
    for i, m in enumerate([10, 1, 2]):
        single = lanczos(A, X[:, i], num_steps=10)
        assert single.num_matvecs == m
        torch.testing.assert_close(runs.alpha[i, :m], single.alpha)
        torch.testing.assert_close(runs.beta[i, : m - 1], single.beta)
        torch.testing.assert_close(runs.basis[i, :m].T, single.basis)
        assert not bool(runs.basis[i, m:].any())


def test_half_precision_operators_have_their_recurrence_in_float32() -> None:
    A = with_spectrum(spectra(N)["outliers over a bulk"]).to(torch.bfloat16)
    K = lanczos(A, start(), num_steps=20)
    assert K.alpha.dtype == torch.float32
    torch.testing.assert_close(K.basis.T @ K.basis, torch.eye(20), rtol=0, atol=1e-5)
    top = torch.linalg.eigvalsh(A.double())[-1]
    assert abs(ritz(K)[0][-1] - top) < 0.02 * top  # products are rounded to bfloat16: 0.4 % each


@pytest.mark.parametrize(
    ("v0", "num_steps", "message"),
    [
        (torch.ones(3, dtype=F64), 3, r"v0 must be a vector of shape \(60,\), got \(3,\)"),
        (torch.ones(N, 1, dtype=F64), 3, "v0 must be a vector"),
        (torch.zeros(N, dtype=F64), 3, "norm that is positive"),
        (torch.ones(N, dtype=F64), 0, r"num_steps must be in \[1, 60\], got 0"),
        (torch.ones(N, dtype=F64), 61, r"num_steps must be in \[1, 60\], got 61"),
    ],
)
def test_bad_input(v0: torch.Tensor, num_steps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lanczos(with_spectrum(spectra(N)["flat"]), v0, num_steps=num_steps)


def test_it_says_which_product_was_not_finite() -> None:
    A = torch.eye(4, dtype=F64)
    A[2, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="product 1 with the operator is not finite"):
        lanczos(A, torch.ones(4, dtype=F64), num_steps=2)
    with pytest.raises(InputError, match=r"square matrix that is not empty, got shape \(3, 4\)"):
        lanczos(torch.ones(3, 4), torch.ones(4), num_steps=1)
