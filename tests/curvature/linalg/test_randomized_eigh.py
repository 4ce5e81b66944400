"""Eigenpairs by randomised Rayleigh-Ritz: against dense solvers, and above all when they cannot be trusted."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError, NotConvergedError
from curvature.linalg import LowRank, randomized_eigh
from curvature.linop import Counting
from curvature.results.estimates import Status
from tests.matrices import F64, generator, spectra, twenty_spectra, with_spectrum

NUM_SEEDS = 400
EPS = {torch.float64: 2.2e-16, torch.float32: 1.2e-7}


def norm(A: Tensor) -> float:
    return float(torch.linalg.matrix_norm(A.double(), 2))


def largest_in_magnitude(A: Tensor, k: int) -> Tensor:
    exact = torch.linalg.eigvalsh(A.double())
    return exact[exact.abs().argsort(descending=True)[:k]].sort(descending=True).values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", spectra(80))
def test_residuals_bound_and_order_are_the_truth(name: str, dtype: torch.dtype) -> None:
    A = with_spectrum(spectra(80)[name]).to(dtype)
    found = randomized_eigh(A, 8, generator=generator())
    values, U = found.eigenvalues.double(), found.eigenvectors.double()
    rounding = 100 * EPS[dtype] * norm(A) + 1e-30
    assert found.residual_norms is not None
    assert found.residual_norms.dtype == dtype
    residuals = (A.double() @ U - U * values).norm(dim=0)
    torch.testing.assert_close(found.residual_norms.double(), residuals, rtol=1e-3, atol=rounding)
    torch.testing.assert_close(U.T @ U, torch.eye(8, dtype=F64), rtol=0, atol=100 * EPS[dtype])
    assert bool((values.diff() <= 0).all())
    exact = torch.linalg.eigvalsh(A.double())
    for value, residual in zip(values, residuals, strict=True):
        assert float((exact - value).abs().min()) <= float(residual) + rounding
    assert norm(A.double() - found.to_dense().double()) <= float(found.error_bound) + rounding
    ours = torch.cat([values, torch.zeros(72, dtype=F64)]).sort().values  # by rank in order, Weyl
    assert float((ours - exact).abs().max()) <= float(found.error_bound) + rounding
    assert found.num_matvecs == 3 * 18 + 10


@pytest.mark.parametrize("values", [[3.0, -2.0, 1.0], [-5.0], [2.0, 2.0, 2.0, -2.0, -2.0]])
def test_low_rank_is_recovered(values: list[float]) -> None:
    spectrum = torch.cat([torch.tensor(values, dtype=F64), torch.zeros(120 - len(values), dtype=F64)])
    A = with_spectrum(spectrum)
    found = randomized_eigh(A, len(values), power_iterations=0, generator=generator())
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(
        found.eigenvalues, torch.tensor(values, dtype=F64).sort(descending=True).values, rtol=0, atol=1e-10
    )
    torch.testing.assert_close(found.to_dense(), A, rtol=0, atol=1e-10)
    assert float(found.error_bound) < 1e-10


def test_every_pass_helps() -> None:
    A = with_spectrum(spectra(200)["slow exponential"] * (-1.0) ** torch.arange(200, dtype=F64))
    exact = largest_in_magnitude(A, 5)
    errors, residuals = [], []
    for q in range(4):
        found = randomized_eigh(A, 5, power_iterations=q, generator=generator())
        assert found.residual_norms is not None
        errors.append(float((found.eigenvalues - exact).abs().max()))
        residuals.append(float(found.residual_norms.max()))
    assert all(later < earlier / 3 for earlier, later in itertools.pairwise(errors))
    assert all(later < earlier for earlier, later in itertools.pairwise(residuals))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "A",
    [torch.zeros(30, 30), -3 * torch.eye(30), -2 * torch.ones(30, 30), torch.tensor([[-5.0]]), torch.tensor([[0.0]])],
    ids=["zero", "multiple of the identity", "rank one", "n = 1", "n = 1, zero"],
)
def test_degenerate_matrices(A: Tensor, dtype: torch.dtype) -> None:
    A = A.to(dtype)
    for rank in {1, len(A)}:
        found = randomized_eigh(A, rank, num_tests=40, generator=generator())
        assert found.raise_if_failed() is found
        expected = largest_in_magnitude(A, rank).to(dtype)
        torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=100 * EPS[dtype] * norm(A))
        assert norm(A - found.to_dense()) <= float(found.error_bound) + 300 * EPS[dtype] * norm(A)


# -- trust ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", twenty_spectra(200))
def test_values_that_are_called_right_are_right_and_all_others_are_not_called_so(name: str) -> None:
    A = with_spectrum(twenty_spectra(200)[name])
    for q in (0, 1, 3):
        found = randomized_eigh(A, 6, power_iterations=q, rtol=1e-2, generator=generator(q))
        exact, U = largest_in_magnitude(A, 6), found.eigenvectors
        true = (A @ U - U * found.eigenvalues).norm(dim=0) <= 1e-2 * found.eigenvalues.abs()
        assert found.converged is not None
        assert torch.equal(found.converged, true)
        assert found.status is (Status.CONVERGED if bool(true.all()) else Status.SLOW_DECAY)
        if found.status.ok:
            assert bool(((found.eigenvalues - exact).abs() <= 1e-2 * exact.abs()).all())


def test_slow_decay_is_said_and_passes_cure_it() -> None:
    A = with_spectrum(twenty_spectra(400)["like a Hessian"])
    poor = randomized_eigh(A, 10, oversampling=0, power_iterations=0, generator=generator())
    assert poor.status is Status.SLOW_DECAY
    with pytest.raises(NotConvergedError, match=r"\d of 10 eigenpairs.*power_iterations") as caught:
        poor.raise_if_failed()
    assert isinstance(caught.value.result, LowRank)
    cured = randomized_eigh(A, 5, power_iterations=5, generator=generator())
    assert cured.status is Status.CONVERGED
    torch.testing.assert_close(cured.eigenvalues, largest_in_magnitude(A, 5), rtol=1e-4, atol=0)


def test_the_bound_fails_at_its_rate() -> None:
    values = torch.cat([torch.tensor([3.0, -2.5, 2.0, -0.5], dtype=F64), torch.zeros(36, dtype=F64)])
    A, p = with_spectrum(values), 0.2  # three pairs of four: what is left is of rank one, the worst case
    failures = 0
    for seed in range(NUM_SEEDS):
        found = randomized_eigh(A, 3, oversampling=1, num_tests=3, failure_probability=p, generator=generator(seed))
        failures += int(float(found.error_bound) < norm(A - found.to_dense()))
    assert abs(failures - p * NUM_SEEDS) < 4 * (NUM_SEEDS * p * (1 - p)) ** 0.5


# -- the door ---------------------------------------------------------------------------------------------------------


def test_products_are_counted() -> None:
    A = Counting(with_spectrum(spectra(50)["indefinite"]))
    told: list[int] = []
    found = randomized_eigh(
        A,
        6,
        oversampling=4,
        power_iterations=2,
        num_tests=3,
        generator=generator(),
        callback=lambda done, _: told.append(done),
    )
    assert found.num_matvecs == A.num_matvecs == 43
    assert told == [10, 20, 30, 40, 43]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank must be in \[1, 6\], got 0"),
        ({"rank": 7}, r"rank must be in \[1, 6\], got 7"),
        ({"oversampling": -1}, "oversampling must be at least 0"),
        ({"power_iterations": -1}, "power_iterations must be at least 0"),
        ({"num_tests": -1}, "num_tests must be at least 0"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"failure_probability": 1.0}, r"failure_probability must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    settings: dict[str, float] = {"rank": 3, **arguments}
    with pytest.raises(InputError, match=message):
        randomized_eigh(torch.eye(6), generator=generator(), **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="square"):
        randomized_eigh(torch.ones(3, 4), 2, generator=generator())


def test_products_that_are_not_finite_are_said() -> None:
    A = torch.eye(20)
    A[3, 3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"product 13 .* is not finite"):
        randomized_eigh(A, 3, generator=generator())
