"""Norms against dense ones: identities, standard errors, and how often bounds hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from curvature.errors import InputError, NonFiniteError
from curvature.linalg.stochastic.norms import frobenius_norm, spectral_norm
from curvature.linop import Counting
from curvature.results.estimates import Status
from tests.matrices import F64, generator, spectra, with_spectrum

NUM_SEEDS = 400


# -- Frobenius --------------------------------------------------------------------------------------------------------


def test_the_variance_over_all_sign_vectors_is_the_formula_of_the_docstring() -> None:
    A = with_spectrum(torch.linspace(-1, 2, 10, dtype=F64))
    Z = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=10)), dtype=F64).T
    squares = (A @ Z).square().sum(dim=0)
    B = A.T @ A
    torch.testing.assert_close(squares.mean(), A.square().sum())
    torch.testing.assert_close(squares.var(correction=0), 2 * (B.square().sum() - B.diagonal().square().sum()))


@pytest.mark.parametrize(
    ("name", "sketch_size"), [("flat", None), ("flat", 0), ("flat", 8), ("indefinite", 8), ("slow exponential", None)]
)
def test_the_standard_error_of_the_frobenius_norm_is_the_truth(name: str, sketch_size: int | None) -> None:
    A = with_spectrum(spectra(100)[name])
    z = []
    for seed in range(NUM_SEEDS):
        e = frobenius_norm(A, num_matvecs=60, generator=generator(seed), sketch_size=sketch_size, block_size=60)
        z.append((e.value - A.norm()) / e.stderr)
    scores = torch.stack(z)
    assert abs(scores.mean()) < 0.4  # samples are skewed
    assert 0.9 < scores.std() < (1.1 if name != "slow exponential" else 1.25)  # more where few eigenvalues rule


def test_intervals_of_skewed_samples_cover() -> None:
    """Squares of one normal number each: Student's t alone covers 82 to 87 % with 8 to 12 of them."""
    A, covered = with_spectrum(spectra(40)["rank one"]), 0
    for seed in range(NUM_SEEDS):
        estimate = frobenius_norm(A, num_matvecs=8, generator=generator(seed), sketch_size=0, block_size=8)
        low, high = estimate.interval()
        covered += bool(low <= A.norm() <= high)
    assert covered / NUM_SEEDS > 0.91


def test_probes_that_are_one_up_to_sign_are_not_taken_for_agreement() -> None:
    """Of 200 norms of a matrix of size 6 from two sign vectors each, 5 had an error of 0 and were wrong."""
    A = with_spectrum(torch.tensor([3.0, 1.0, 0.5, 0.2, -0.1, 0.05], dtype=F64))
    for seed in range(200):
        estimate = frobenius_norm(A, num_matvecs=4, generator=seed)
        assert estimate.stderr > 0 or abs(estimate.value - A.norm()) < 1e-12


def test_a_basis_takes_outliers_out_and_is_not_bought_where_it_does_not_pay() -> None:
    decaying, flat = with_spectrum(spectra(100)["slow exponential"]), with_spectrum(spectra(100)["flat"])
    with_basis = frobenius_norm(decaying, num_matvecs=60, generator=generator())
    without = frobenius_norm(decaying, num_matvecs=60, generator=generator(), sketch_size=0)
    assert with_basis.stderr < without.stderr / 5
    chosen = frobenius_norm(flat, num_matvecs=60, generator=generator())
    plain = frobenius_norm(flat, num_matvecs=60, generator=generator(), sketch_size=0)
    assert chosen.stderr < 1.3 * plain.stderr


@pytest.mark.parametrize("name", ["zero", "rank one", "multiple of the identity"])
def test_degenerate_spectra_have_their_frobenius_norm(name: str) -> None:
    A = with_spectrum(spectra(40)[name])
    counted = Counting(A)
    estimate = frobenius_norm(counted, num_matvecs=20, generator=generator())
    torch.testing.assert_close(estimate.value, A.norm(), rtol=1e-10, atol=1e-14)
    assert estimate.num_matvecs == counted.num_matvecs <= 20


def test_more_products_than_rows_make_the_frobenius_norm_exact() -> None:
    for n in (1, 2, 9):
        A = with_spectrum(torch.linspace(-1, 2, n, dtype=F64))
        estimate = frobenius_norm(A, num_matvecs=10, generator=generator())
        torch.testing.assert_close(estimate.value, A.norm())
        assert estimate.stderr == 0
        assert estimate.num_matvecs == n


# -- spectral ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", spectra(80))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_spectral_norm_lies_between_the_bounds(name: str, dtype: torch.dtype) -> None:
    A = with_spectrum(spectra(80)[name]).to(dtype)
    exact = float(torch.linalg.matrix_norm(A.double(), ord=2))
    slack = 20 * torch.finfo(dtype).eps * exact
    for seed in range(3):
        counted = Counting(A)
        bounds = spectral_norm(counted, generator=generator(seed))
        assert bounds.num_matvecs == counted.num_matvecs
        assert bounds.status is Status.CONVERGED
        assert bounds.lower - slack <= exact <= bounds.upper + slack
        assert bounds.upper <= 1.011 * bounds.lower


@pytest.mark.parametrize("psd", [False, True])
def test_the_upper_bound_fails_no_more_often_than_stated(psd: bool) -> None:
    A = with_spectrum(spectra(60)["polynomial"]) if psd else with_spectrum(spectra(60)["indefinite"])
    exact = float(torch.linalg.matrix_norm(A, ord=2))
    for steps in (2, 5):
        failures = 0
        for seed in range(NUM_SEEDS):
            bounds = spectral_norm(
                A, rtol=1e-9, failure_probability=0.2, psd=psd, max_matvecs=steps, generator=generator(seed)
            )
            failures += bool(bounds.upper < exact)
            assert bounds.lower <= exact * (1 + 1e-12)
        assert failures / NUM_SEEDS < 0.2 + 3 * (0.2 * 0.8 / NUM_SEEDS) ** 0.5


def test_the_bound_is_not_empty() -> None:
    """With one step and n = 2 the event is known in closed form: it fails about as often as it says."""
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    failures = 0
    for seed in range(2000):
        bounds = spectral_norm(
            A, rtol=1e-9, failure_probability=0.3, psd=True, max_matvecs=1, generator=generator(seed)
        )
        failures += bool(bounds.upper < 1)
    # q = (cos t, sin t): the bound cos^2 + |sin cos| / delta falls below 1 iff |cos t| < delta |sin t|, with
    # delta = sin(0.3 pi / 2): a share (2/pi) atan(delta) of all t
    expected = 2 / math.pi * math.atan(math.sin(0.3 * math.pi / 2))
    assert abs(failures / 2000 - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


def test_products_stay_below_the_number_that_suffices_for_every_spectrum() -> None:
    for name in ("flat", "polynomial", "clustered", "exponential"):
        n = 200
        A = with_spectrum(spectra(n)[name])
        bounds = spectral_norm(A, rtol=0.02, failure_probability=0.01, psd=True, generator=generator())
        sufficient = (math.log(1.648 * n**0.5 / 0.01) / 0.02**0.5 + 1) / 2
        assert bounds.num_matvecs <= sufficient


def test_an_accuracy_out_of_reach_is_said_to_be_missed() -> None:
    A = with_spectrum(spectra(80)["clustered"])
    bounds = spectral_norm(A, rtol=1e-6, max_matvecs=4, generator=generator())
    assert bounds.status is Status.MAX_MATVECS
    assert bounds.num_matvecs == 4


def test_one_row() -> None:
    bounds = spectral_norm(torch.tensor([[-3.0]]), generator=generator())
    torch.testing.assert_close(bounds.lower, torch.tensor(3.0))
    torch.testing.assert_close(bounds.upper, torch.tensor(3.0))


def test_bad_settings() -> None:
    A = torch.eye(9)
    for arguments, message in [
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"failure_probability": 1.0}, r"failure_probability must be in \(0, 1\)"),
        ({"max_matvecs": 0}, "max_matvecs must be at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            spectral_norm(A, generator=generator(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_matvecs must be at least 4"):
        frobenius_norm(A, num_matvecs=2, generator=generator())
    with pytest.raises(InputError, match=r"sketch_size must be in \[0, 3\]"):
        frobenius_norm(A, num_matvecs=8, sketch_size=4, generator=generator())
    with pytest.raises(NonFiniteError, match="product 1"):
        spectral_norm(A * torch.nan, generator=generator())
