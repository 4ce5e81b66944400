"""Diagonals: exact identities first, then published errors, then the error bars of single entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg import diagonal, eigsh
from curvature.linop import Counting
from curvature.results.estimates import DiagonalEstimate, Status
from tests.matrices import F64, generator, orthogonal, spectra, with_spectrum

NUM_SEEDS = 400


# -- Hutchinson's estimator -------------------------------------------------------------------------------------------


def test_the_standard_errors_of_the_diagonal_are_the_truth() -> None:
    A = with_spectrum(spectra(80)["indefinite"])
    found = [diagonal(A, method="hutchinson", num_matvecs=60, generator=seed, block_size=25) for seed in range(100)]
    scores = torch.stack([(e.value - A.diagonal()) / e.stderr for e in found])
    assert scores.mean().abs() * (100 * 80) ** 0.5 < 8  # entries share probes
    assert 0.9 < scores.std() < 1.1
    variance = A.square().sum(dim=1) - A.diagonal().square()
    observed = torch.stack([e.stderr.square() * 60 for e in found]).mean(dim=0)
    assert bool(((observed / variance - 1).abs() < 0.15).all())


def test_samples_that_are_kept_tell_the_same_as_those_that_are_not() -> None:
    A = with_spectrum(spectra(80)["indefinite"])
    lean, kept = (
        diagonal(A, method="hutchinson", num_matvecs=20, generator=3, block_size=20, keep_samples=keep)
        for keep in (False, True)
    )
    assert kept.samples is not None
    torch.testing.assert_close(lean.value, kept.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lean.stderr, kept.stderr, rtol=1e-10, atol=1e-12)


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "xdiag"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_is_exact(rank: int, method: str) -> None:
    eigenvalues = torch.zeros(200, dtype=F64)
    eigenvalues[:rank] = torch.linspace(-1, 4, rank, dtype=F64)
    A = with_spectrum(eigenvalues)
    for goal in ({"num_matvecs": 24}, {"rtol": 1e-6}):
        estimate = diagonal(A, method=method, generator=generator(), **goal)  # type: ignore[arg-type]
        torch.testing.assert_close(estimate.value, A.diagonal(), rtol=0, atol=1e-10)
        assert estimate.stderr.max() < 1e-7
        assert estimate.num_matvecs <= 35
        assert estimate.status.ok


@pytest.mark.parametrize("method", ["auto", "xdiag", "hutchinson"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_more_products_than_rows_make_the_diagonal_exact(n: int, method: str) -> None:
    A = with_spectrum(torch.linspace(-1, 2, n, dtype=F64))
    for goal in ({"num_matvecs": 7}, {"rtol": 1e-9}):
        counted = Counting(A)
        estimate = diagonal(counted, method=method, generator=generator(), **goal)  # type: ignore[arg-type]
        torch.testing.assert_close(estimate.value, A.diagonal(), rtol=0, atol=1e-14)
        assert estimate.method == "exact"
        assert bool((estimate.stderr == 0).all())
        assert counted.num_matvecs == estimate.num_matvecs == n


@pytest.mark.parametrize("name", ["zero", "multiple of the identity", "rank one"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_degenerate_spectra(name: str, dtype: torch.dtype) -> None:
    A = torch.diag(spectra(40)[name]).to(dtype)
    for method in ("auto", "xdiag", "hutchinson"):
        estimate = diagonal(A, method=method, num_matvecs=20, generator=generator())
        error = (estimate.value - A.diagonal()).abs()
        assert bool((error <= 5 * estimate.stderr + 100 * torch.finfo(dtype).eps * A.abs().max()).all())


# -- published errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "m", "hutchinson", "xdiag"),
    [  # mean of the largest error of an entry over the largest entry, published estimators on signs, n = 1000
        ("flat", 60, 0.12, 0.23),
        ("poly", 60, 2.1, 1.6e-2),
        ("slowexp", 120, 1.1, 1.1e-2),
        ("exp", 60, 1.9, 4.3e-4),
        ("exp", 120, 1.4, 1.2e-8),
        ("bigstep", 120, 0.80, 2.1e-7),
    ],
)
def test_errors_are_the_published_ones(name: str, m: int, hutchinson: float, xdiag: float) -> None:
    i = torch.arange(1000, dtype=F64)
    eigenvalues = {
        "flat": torch.linspace(1, 3, 1000, dtype=F64),
        "poly": (i + 1) ** -2,
        "slowexp": 0.9**i,
        "exp": 0.7**i,
        "bigstep": torch.where(i < 50, 1.0, 1e-8).to(F64),
    }[name]
    Q = orthogonal(1000)
    A = (Q * eigenvalues) @ Q.T

    def error(method: str) -> float:
        estimates = [diagonal(A, method=method, num_matvecs=m, generator=generator(s), block_size=m) for s in range(5)]
        worst = [(e.value - A.diagonal()).abs().max() / A.diagonal().max() for e in estimates]
        return float(torch.stack(worst).mean())

    assert hutchinson / 3 < error("hutchinson") < 3 * hutchinson
    assert xdiag / 3 < error("xdiag") < 3 * xdiag
    assert error("auto") < 4 * min(hutchinson, xdiag)


# -- error bars -------------------------------------------------------------------------------------------------------


def z_scores(A: Tensor, method: str, num_matvecs: int) -> Tensor:
    estimates = [
        diagonal(A, method=method, num_matvecs=num_matvecs, generator=generator(seed), block_size=num_matvecs)
        for seed in range(NUM_SEEDS)
    ]
    return torch.stack([(e.value - A.diagonal()) / e.stderr for e in estimates])


@pytest.mark.parametrize(("method", "name"), [("xdiag", "indefinite"), ("auto", "indefinite"), ("xdiag", "flat")])
def test_the_standard_errors_of_entries_are_the_truth(method: str, name: str) -> None:
    z = z_scores(with_spectrum(spectra(100)[name]), method, 60)
    assert bool((z.mean(dim=0).abs() * NUM_SEEDS**0.5 < 5).all())
    assert 0.9 < z.std() < 1.1


def test_a_basis_that_hardly_exceeds_the_rank_is_covered() -> None:
    """The covariances of leave-one-out estimates scatter widely there: with their estimate alone 90 % are covered."""
    A = with_spectrum(torch.where(torch.arange(100) < 15, 1.0, 1e-4).to(F64))
    found = [diagonal(A, method="xdiag", num_matvecs=36, generator=generator(s), block_size=18) for s in range(300)]
    covers = [((e.value - A.diagonal()).abs() <= e.half_width()).double().mean() for e in found]
    assert 0.92 <= torch.stack(covers).mean() <= 0.98


def test_kept_samples_give_the_standard_error_of_a_sum() -> None:
    A = with_spectrum(spectra(40)["flat"])
    z = []
    for seed in range(NUM_SEEDS):
        e = diagonal(
            A, method="hutchinson", num_matvecs=30, generator=generator(seed), keep_samples=True, block_size=30
        )
        assert e.samples is not None
        torch.testing.assert_close(e.samples.mean(dim=1), e.value)
        sums = e.samples[:10].sum(dim=0)
        z.append((sums.mean() - A.diagonal()[:10].sum()) / (sums.std() / 30**0.5))
    assert 0.9 < torch.stack(z).std() < 1.1


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "xdiag", "hutchinson"])
@pytest.mark.parametrize("goal", [{"num_matvecs": 31}, {"rtol": 0.05, "max_matvecs": 90}])
def test_products_are_counted_and_within_the_budget(method: str, goal: dict[str, float]) -> None:
    counted = Counting(with_spectrum(spectra(120)["slow exponential"]))
    estimate = diagonal(counted, method=method, generator=generator(), block_size=4, **goal)  # type: ignore[arg-type]
    assert counted.num_matvecs == estimate.num_matvecs <= max(goal.values())


def test_an_accuracy_is_reached_or_said_to_be_missed() -> None:
    A = with_spectrum(spectra(200)["polynomial"])

    def run(method: str) -> DiagonalEstimate:
        return diagonal(A, method=method, rtol=0.02, max_matvecs=100, generator=generator())

    reached = run("auto")
    assert reached.status is Status.CONVERGED
    assert (reached.value - A.diagonal()).norm() < 0.04 * A.diagonal().norm()
    assert run("hutchinson").status is Status.MAX_MATVECS


def test_known_eigenpairs_take_their_variance_away() -> None:
    A = with_spectrum(spectra(150)["outliers over a bulk"])
    pairs = eigsh(A, 3, rtol=1e-6, generator=generator(1))
    for method in ("hutchinson", "auto", "xdiag"):
        plain = diagonal(A, method="hutchinson", num_matvecs=40, generator=generator())
        deflated = diagonal(A, method=method, num_matvecs=40, generator=generator(), deflate=pairs)
        assert deflated.stderr.norm() < 0.1 * plain.stderr.norm()
        z = (deflated.value - A.diagonal()) / deflated.stderr
        assert z.square().mean().sqrt() < 1.5


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of num_matvecs"),
        ({"num_matvecs": 8, "rtol": 0.1}, "exactly one of num_matvecs"),
        ({"num_matvecs": 3}, "num_matvecs must be at least 4"),
        ({"num_matvecs": 8, "method": "diag++"}, "method must be one of auto, hutchinson, xdiag"),
        ({"rtol": -1.0}, "rtol must be positive"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        diagonal(torch.eye(30), generator=generator(), **arguments)  # type: ignore[arg-type]


def test_products_that_are_not_finite_are_an_error() -> None:
    A = torch.eye(20)
    A[3, 3] = torch.inf
    with pytest.raises(NonFiniteError, match="product 1 with the operator is not finite"):
        diagonal(A, num_matvecs=10, generator=generator())
