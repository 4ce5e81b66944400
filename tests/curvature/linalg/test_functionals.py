"""Functions of the spectrum from one quadrature run: exact where it can be, then bounds, then error bars."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg import (
    cdf,
    count,
    effective_dimension,
    eigsh,
    logdet,
    moments,
    quantile,
    spectral_density,
    spectral_sum,
    wasserstein,
)
from curvature.linalg.stochastic.slq import smoothed
from curvature.results.estimates import SpectralDensity
from tests.matrices import F64, generator, orthogonal, spectra, with_spectrum

NUM_SEEDS = 200
HALF = NUM_SEEDS // 2  # where one seed takes long
POSITIVE = torch.linspace(0.5, 4.5, 40, dtype=F64) ** 2


def density_of(A: Tensor, *, num_steps: int, deflate: int = 0) -> SpectralDensity:
    """A density whose probes average over a whole orthonormal basis: all that is left is the error of the rule."""
    n = len(A)
    known = eigsh(A, deflate, rtol=1e-12, generator=generator(1)) if deflate else None
    return spectral_density(
        A,
        num_probes=n,
        num_steps=num_steps,
        generator=generator(),
        probes=orthogonal(n, 9),
        deflate=known,
        block_size=n,
        sigma=0.1,
    )


def estimated(A: Tensor, seed: int, *, num_probes: int = 24, num_steps: int = 16) -> SpectralDensity:
    return spectral_density(
        A,
        num_probes=num_probes,
        num_steps=num_steps,
        generator=generator(seed),
        block_size=num_probes,
        num_points=2,
    )


def test_with_all_probes_and_steps_every_functional_is_exact() -> None:
    density = density_of(with_spectrum(POSITIVE), num_steps=40)
    torch.testing.assert_close(logdet(density, damping=0.3).value, torch.log(POSITIVE + 0.3).sum())
    torch.testing.assert_close(spectral_sum(density, torch.sqrt).value, POSITIVE.sqrt().sum())
    z = torch.tensor([[0.1, 1.0], [10.0, 100.0]], dtype=F64)
    exact = (POSITIVE / (POSITIVE + z[..., None])).sum(dim=-1)
    torch.testing.assert_close(effective_dimension(density, z).value, exact)
    powers = torch.stack([(POSITIVE**p).mean() for p in range(5)])
    torch.testing.assert_close(moments(density, range(5)).value, powers)
    between = (POSITIVE[:-1] + POSITIVE[1:]) / 2
    torch.testing.assert_close(cdf(density, between).value, torch.arange(1, 40, dtype=F64) / 40)
    torch.testing.assert_close(quantile(density, [0.0, 0.5, 1.0]).value, POSITIVE[[0, 19, 39]])
    torch.testing.assert_close(count(density, float(between[4]), float(between[9])).value, torch.tensor(5.0, dtype=F64))
    assert wasserstein(density, POSITIVE) < 1e-10


def test_the_rule_is_exact_to_degree_2m_minus_1() -> None:
    density = density_of(with_spectrum(POSITIVE), num_steps=3)
    powers = torch.stack([(POSITIVE**p).mean() for p in range(7)])
    values = moments(density, range(7)).value
    torch.testing.assert_close(values[:6], powers[:6], rtol=1e-12, atol=0)
    assert values[6] < (1 - 1e-6) * powers[6]


def test_the_rule_errs_upwards_and_falls_to_the_answer() -> None:
    A = with_spectrum(POSITIVE)
    for functional, exact in [
        (lambda d: logdet(d, damping=0.1), torch.log(POSITIVE + 0.1).sum()),
        (lambda d: effective_dimension(d, 0.1), (POSITIVE / (POSITIVE + 0.1)).sum()),
    ]:
        errors = [float(functional(density_of(A, num_steps=m)).value - exact) for m in (2, 4, 8)]
        assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("name", ["flat", "indefinite", "step", "many null", "outliers over a bulk"])
@pytest.mark.parametrize("deflate", [0, 3])
def test_the_bounds_of_every_single_probe_hold(name: str, deflate: int) -> None:
    A = with_spectrum(spectra(60)[name])
    known = eigsh(A, deflate, rtol=1e-12, generator=generator(1)) if deflate else None
    values, vectors = torch.linalg.eigh(A)
    outside = torch.arange(60) < 60 - deflate
    points = torch.linspace(-1.1, 1.1, 301, dtype=F64) * values.abs().max()
    for seed in range(10):
        z = torch.randn(60, 1, generator=generator(seed), dtype=F64)
        density = spectral_density(
            A, num_probes=1, num_steps=6, generator=generator(), probes=z, deflate=known, sigma=1.0
        )
        seen = z if known is None else z - known.eigenvectors @ (known.eigenvectors.T @ z)
        measure = (vectors.T @ seen)[:, 0].square()
        measure = measure / measure.sum() * (1 - deflate / 60) + (~outside).double() / 60
        exact = (measure * (values <= points[:, None])).sum(dim=1)
        share = cdf(density, points)
        near = (values - points[:, None]).abs().min(dim=1).values < 1e-9  # an atom at the point itself, to rounding
        assert bool(((share.lower <= exact + 1e-9) & (exact <= share.upper + 1e-9) | near).all())
        assert bool((share.lower <= share.value).all() & (share.value <= share.upper).all())
        low, high = float(points[100]), float(points[250])
        inside = float((measure * ((values >= low) & (values <= high))).sum()) * 60
        number = count(density, low, high)
        assert number.lower - 1e-7 <= inside <= number.upper + 1e-7


def test_outliers_that_are_known_are_counted_exactly() -> None:
    A = with_spectrum(spectra(200)["outliers over a bulk"])
    top = eigsh(A, 3, rtol=1e-8, generator=generator(1))
    density = spectral_density(A, num_probes=10, num_steps=20, generator=generator(), deflate=top)
    number = count(density, 5.0)
    assert abs(number.value - 3) < 1e-12
    assert number.stderr < 1e-12
    assert abs(number.lower - 3) < 1e-12
    assert abs(number.upper - 3) < 0.5
    assert wasserstein(density, spectra(200)["outliers over a bulk"]) < 0.01


def test_the_null_space_is_counted() -> None:
    number = count(estimated(with_spectrum(spectra(80)["many null"]), 0), -1e-6, 1e-6)
    assert abs(number.value - 60) < 4 * number.stderr


def test_few_probes_of_one_outlier_cover_counts_and_sums() -> None:
    """The weight of the outlier is one squared normal number; a larger one that is known hides how skewed that is."""
    g, n, nodes = generator(), 60, torch.tensor([0.005, 7.0, 70.0], dtype=F64).expand(4, -1)
    counted, summed = 0, 0
    for _ in range(400):
        squares = torch.randn(4, n - 1, generator=g, dtype=F64).square()
        outlier = (n - 1) / n * squares[:, 0] / squares.sum(dim=1)
        known = torch.full((4,), 1 / n, dtype=F64)
        weights = torch.stack([1 - known - outlier, outlier, known], dim=1)
        found = smoothed(nodes, weights, n=n, num_steps=None, known=nodes[0, 2:], num_matvecs=0, num_points=2)
        low, high = count(found, 0.0, 1.0).interval()
        counted += bool(low <= n - 2 <= high)
        low, high = spectral_sum(found, lambda x: x).interval()
        summed += bool(low <= 77 + 0.005 * (n - 2) <= high)
        torch.testing.assert_close(n * torch.cat(moments(found, [1]).interval()), torch.stack([low, high]))
    assert 0.92 <= counted / 400 <= 0.97
    assert 0.92 <= summed / 400 <= 0.97


def test_standard_errors_are_the_truth() -> None:
    A = with_spectrum(POSITIVE)
    exact = [torch.log(POSITIVE + 1).sum(), (POSITIVE / (POSITIVE + 1)).sum(), POSITIVE.square().mean()]
    scores = []
    for seed in range(HALF):
        density = estimated(A, seed)
        estimates = [logdet(density, damping=1.0), effective_dimension(density, 1.0), moments(density, [2])]
        scores.append(torch.stack([((e.value - x) / e.stderr).sum() for e, x in zip(estimates, exact, strict=True)]))
    z = torch.stack(scores)
    assert bool((z.mean(dim=0).abs() * HALF**0.5 < 4).all())
    assert bool(((z.std(dim=0) > 0.87) & (z.std(dim=0) < 1.13)).all())


def test_errors_of_counts_are_the_truth_and_intervals_cover() -> None:
    eigenvalues = POSITIVE[:32:2]
    A = with_spectrum(eigenvalues)
    exact = int(((eigenvalues >= 2) & (eigenvalues <= 9)).sum())
    scores, counted, widths = [], 0, []
    for seed in range(HALF):
        number = count(estimated(A, seed), 2.0, 9.0)  # as many steps as eigenvalues: chance alone
        scores.append((number.value - exact) / number.stderr)
        if seed % 2:
            continue
        density = estimated(A, seed, num_steps=12)
        number = count(density, 2.0, 9.0)
        low, high = number.lower - 2 * number.stderr, number.upper + 2 * number.stderr
        counted += bool(low <= exact <= high)
        widths.append(high - low)
    z = torch.stack(scores)
    assert abs(z.mean()) * HALF**0.5 < 4
    assert 0.87 < z.std() < 1.13
    assert counted >= 0.95 * HALF / 2
    assert torch.stack(widths).mean() < 12  # of 16: the bounds say something


HARD = {
    "uniform": (torch.linspace(0, 1, 200, dtype=F64), [0.5, 1.0]),
    "negative outlier": (torch.cat([torch.tensor([-1e6]), torch.linspace(-1, 1, 59)]).double(), [0.3, 1.0]),
    "large outlier": (torch.cat([torch.linspace(0.01, 1, 59), torch.tensor([1e6])]).double(), [0.0, 0.9]),
    "decay": (torch.logspace(-4, 2, 80, dtype=F64), [0.25, 1.0]),
}


@pytest.mark.parametrize("name", HARD)
def test_intervals_hold_the_error_of_the_rule(name: str) -> None:
    """A quantile is covered where the interval of F there holds its level: that is cheap, and tried for all seeds."""
    eigenvalues, levels = HARD[name]
    n, seeds, A = len(eigenvalues), 100, torch.diag(eigenvalues)
    exact = eigenvalues[[max(math.ceil(q * n), 1) - 1 for q in levels]]
    points = torch.cat([exact, torch.tensor([0.9999], dtype=F64)])
    share = torch.tensor([*levels, float((eigenvalues <= 0.9999).double().mean())], dtype=F64)
    z = torch.tensor([1e-3, 0.1], dtype=F64)
    dimension = (eigenvalues[:, None] / (eigenvalues[:, None] + z)).sum(dim=0)
    answers = torch.zeros(5)
    for seed in range(seeds):
        density = estimated(A, seed, num_probes=8, num_steps=5)
        low, high = cdf(density, points).interval()
        holds = (low <= share + 1e-12) & (share <= high + 1e-12)
        answers[:3] += holds
        if seed % 25 == 0:
            found = quantile(density, levels)
            low, high = found.interval()
            assert bool(((low <= exact) & (exact <= high))[holds[:2]].all())
            assert bool(((low <= found.lower) & (found.lower <= found.value) & (found.upper <= high)).all())
            open_ended = torch.tensor([q in (0, 1) for q in levels])  # no quadrature says where a spectrum ends
            assert bool(((high - low).isinf() == open_ended).all())
            assert bool((high - low)[~open_ended].median() < 0.9 * (eigenvalues[-1] - eigenvalues[0]))
        if eigenvalues.min() >= 0:
            low, high = effective_dimension(density, z).interval()
            answers[3:] += (low <= dimension) & (dimension <= high)
    assert bool((answers[: 3 if eigenvalues.min() < 0 else 5] >= 0.92 * seeds).all())


def test_wasserstein_is_the_distance_that_scipy_computes() -> None:
    x, y = POSITIVE, spectra(25)["indefinite"]
    expected = scipy.stats.wasserstein_distance(x.numpy(), y.numpy())
    assert abs(wasserstein(x, y) - expected) < 1e-12
    assert abs(wasserstein(x, x + 0.25) - 0.25) < 1e-12
    assert wasserstein(x, x) == 0
    density = estimated(with_spectrum(POSITIVE), 3)
    expected = scipy.stats.wasserstein_distance(
        density.nodes.flatten().numpy(), x.numpy(), density.weights.flatten().numpy()
    )
    assert abs(wasserstein(density, x) - expected) < 1e-12


def test_bad_input() -> None:
    density = estimated(with_spectrum(spectra(40)["indefinite"]), 0)
    with pytest.raises(InputError, match=r"damping must exceed 1, since A has eigenvalues down to -1; got 0\.5"):
        logdet(density, damping=0.5)
    with pytest.raises(InputError, match="A \\+ damping I must be positive definite"):
        effective_dimension(density, [5.0, 0.1])
    with pytest.raises(InputError, match="f must be finite where the spectrum is"):
        spectral_sum(density, torch.log)
    with pytest.raises(InputError, match="orders must not be negative"):
        moments(density, [1, -1])
    with pytest.raises(InputError, match="low must not exceed high"):
        count(density, 1.0, 0.0)
    with pytest.raises(InputError, match=r"levels must be in \[0, 1\]"):
        quantile(density, 1.5)
    with pytest.raises(InputError, match=r"eigenvalues must be a vector that is not empty, got shape \(2, 2\)"):
        wasserstein(density, torch.eye(2))
