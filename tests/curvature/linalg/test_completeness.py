"""CONVERGED says that the k outermost eigenvalues were found, not only that residuals are small."""

from __future__ import annotations

import math

import pytest
import torch

from curvature.errors import InputError
from curvature.linalg import ThickRestartLanczos, lobpcg
from curvature.linalg.krylov._completeness import Bound, Chain
from curvature.results.estimates import Status
from tests.matrices import F64, generator, hard_matrices, missed, true_residuals, wanted, with_spectrum
from tests.matrices import lanczos_pairs as eigsh

N = 48
HARD = hard_matrices(N)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", HARD)
def test_converged_means_that_none_was_missed_and_residuals_are_true(name: str, dtype: torch.dtype) -> None:
    A, ends = HARD[name].to(dtype), 0
    for seed, which in enumerate(["LA", "SA", "LM", "BE"]):
        pairs = eigsh(A, 3, which=which, generator=generator(seed), max_matvecs=150)  # type: ignore[arg-type]
        if pairs.status is Status.CONVERGED:
            ends += 1
            assert not missed(A, pairs, which, 1e-3), which
            assert pairs.miss_probability <= 0.01
            norm = float(torch.linalg.matrix_norm(A.double(), 2))
            tolerance = (1e-3 * pairs.eigenvalues.abs().double()).clamp_min(10 * torch.finfo(dtype).eps * norm)
            assert bool((true_residuals(A, pairs) <= 1.05 * tolerance + 1e-15 * norm).all()), which
    assert ends >= 2, "the certificate must not pass by refusing everything"


@pytest.mark.parametrize("name", ["two narrow clusters", "sinc", "rank 5", "two eigenvalues", "four copies"])
def test_residuals_alone_do_not_tell(name: str) -> None:
    A = HARD[name]
    alone = [eigsh(A, 3, which=which, generator=generator(1), confidence=None) for which in ("LA", "SA")]  # type: ignore[arg-type]
    assert any(missed(A, pairs, which, 1e-3) for pairs, which in zip(alone, ("LA", "SA"), strict=True))
    assert all(math.isnan(pairs.miss_probability) for pairs in alone)


@pytest.mark.parametrize("top", [1e8, 1e10])
def test_the_tolerance_is_the_one_that_is_promised_beside_a_huge_eigenvalue(top: float) -> None:
    A = with_spectrum(torch.cat([torch.tensor([top], dtype=F64), torch.linspace(0, 1, 99, dtype=F64)]))
    pairs = eigsh(A, 3, generator=generator(1))
    assert pairs.status is Status.CONVERGED
    tolerance = max(1e-3, 10 * torch.finfo(F64).eps * top)
    assert float(true_residuals(A, pairs)[1:].max()) <= 1.05 * tolerance
    torch.testing.assert_close(pairs.eigenvalues[1:], wanted(A, 3, "LA")[1:], rtol=0, atol=2 * tolerance)


def test_a_chain_that_may_go_no_further_is_said_to_be_unfinished() -> None:
    A = with_spectrum(torch.linspace(0, 1, 200, dtype=F64))
    enough = eigsh(A, 3, generator=generator())
    short = eigsh(A, 3, generator=generator(), max_matvecs=enough.num_matvecs - 6)
    assert enough.status is Status.CONVERGED
    assert short.status is Status.UNCERTIFIED
    assert bool(short.converged.all())
    assert short.num_matvecs == enough.num_matvecs - 6
    assert 0.01 < short.miss_probability <= 1
    assert not short.status.ok


def test_the_bound_holds_as_often_as_it_says() -> None:
    """The share of random starts from which a chain of s steps meets its bound although an eigenvalue is beyond it."""
    values = torch.cat([torch.linspace(-1, 1, 99, dtype=F64), torch.tensor([1.02], dtype=F64)])
    n, bound, trials, steps = len(values), Bound(1.0, 1.01), 2000, 6
    W = torch.randn(trials, n, generator=generator(0), dtype=F64)
    W = W / W.norm(dim=1, keepdim=True)
    said, false = [], 0
    for w in W:
        chain = Chain(bound, n)
        older, beta = torch.zeros_like(w), 0.0
        for _ in range(steps):
            z = values * w - beta * older
            alpha = float(w @ z)
            z = z - alpha * w
            beta = float(z.norm())
            chain.add(alpha, beta, 0.0)
            older, w = w, z / beta
        p = chain.miss_probability()
        said.append(p)
        false += p <= 0.2
    assert min(said) < 0.5  # the bound is no empty promise ...
    assert false / trials <= 0.2 + 3 * (0.2 * 0.8 / trials) ** 0.5  # ... and no false one: x is beyond, always


def test_a_saved_run_takes_its_chain_along() -> None:
    A = with_spectrum(torch.linspace(0, 1, 100, dtype=F64))

    def solver(seed: int) -> ThickRestartLanczos:
        return ThickRestartLanczos(A, 2, generator=generator(seed))

    whole = solver(0).run()
    first = solver(0)
    assert first.run(max_matvecs=whole.num_matvecs - 3).status is Status.UNCERTIFIED
    second = solver(9)
    second.load_state_dict(first.state_dict())
    resumed = second.run()
    assert resumed.miss_probability == whole.miss_probability
    torch.testing.assert_close(resumed.eigenvectors, whole.eigenvectors, rtol=0, atol=0)


def test_lobpcg_finds_what_its_start_cannot_see() -> None:
    for name, which in (("two eigenvalues", "LA"), ("rank 5", "SA"), ("four copies", "LA"), ("tenfold, again", "LA")):
        pairs = lobpcg(HARD[name], 3, which=which, generator=generator(2))  # type: ignore[arg-type]
        assert pairs.status is Status.CONVERGED
        assert not missed(HARD[name], pairs, which, 1e-3)


@pytest.mark.parametrize("seed", [50, 964, 1007, 1414])
def test_an_eigenvector_that_hides_in_the_basis_is_found(seed: int) -> None:
    """The basis holds most of it, in a Ritz vector far from its eigenvalue; the matrix outside has none that large."""
    A = hard_matrices(64)["two clusters, again"]
    pairs = eigsh(A, 3, generator=generator(seed))
    assert pairs.status is Status.CONVERGED
    assert not missed(A, pairs, "LA", 1e-3)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_a_confidence_is_a_probability(confidence: float) -> None:
    for solver in (eigsh, lobpcg):
        with pytest.raises(InputError, match="confidence must lie between 0 and 1, or be None"):
            solver(torch.eye(9), 2, generator=generator(), confidence=confidence)
