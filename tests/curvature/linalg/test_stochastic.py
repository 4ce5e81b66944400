"""Probes and density: exact identities first, then the estimates, then their error bars."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg import eigsh, normal, rademacher, spectral_density, sphere
from curvature.linop import Counting
from tests.matrices import F64, generator, spectra, with_spectrum

NUM_SEEDS = 400


def test_probes_have_the_moments_they_promise() -> None:
    for draw in (rademacher, normal, sphere):
        Z = draw(20, 4000, generator=generator(), dtype=F64)
        assert Z.shape == (20, 4000)
        second = Z @ Z.T / 4000
        z_scores = (second - torch.eye(20, dtype=F64)) * 4000**0.5
        assert z_scores.abs().max() < 8, draw.__name__  # 210 entries of variance at most 2
    assert set(rademacher(9, 9, generator=generator(), dtype=F64).unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(
        sphere(9, 5, generator=generator(), dtype=F64).norm(dim=0), torch.full((5,), 3.0, dtype=F64)
    )


def test_two_short_sign_vectors_are_never_one_and_their_means_are_unbiased() -> None:
    A = torch.tensor([[1.0, -2.0, 0.5], [-2.0, 3.0, 1.0], [0.5, 1.0, -1.0]], dtype=F64)
    pairs = [rademacher(3, 2, generator=generator(seed), dtype=F64) for seed in range(600)]
    assert max(abs(float(Z[:, 0] @ Z[:, 1])) for Z in pairs) == 1.0
    means = torch.stack([(Z * (A @ Z)).sum(dim=0).mean() for Z in pairs])
    assert abs(means.mean() - A.trace()) < 4 * means.std() / 600**0.5
    alone = rademacher(1, 3, generator=generator(), dtype=F64)
    torch.testing.assert_close(alone.abs(), torch.ones(1, 3, dtype=F64))


# -- density ----------------------------------------------------------------------------------------------------------


def smoothed(eigenvalues: Tensor, grid: Tensor, sigma: float) -> Tensor:
    gaussians = torch.distributions.Normal(eigenvalues, sigma).log_prob(grid[:, None]).exp()
    return gaussians.mean(dim=1)


def test_with_as_many_steps_as_distinct_eigenvalues_and_all_probes_the_density_is_exact() -> None:
    eigenvalues = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 4.0], dtype=F64)
    A = with_spectrum(eigenvalues)
    density = spectral_density(
        A,
        num_probes=6,
        num_steps=6,
        generator=generator(),
        probes=torch.linalg.eigh(A)[1] @ _hadamard_like(6),
        sigma=0.2,
    )
    torch.testing.assert_close(density.density, smoothed(eigenvalues, density.grid, 0.2), rtol=0, atol=1e-12)


def _hadamard_like(n: int) -> Tensor:
    """Orthogonal columns whose squared entries average to 1/n over the columns, as any orthogonal matrix's do."""
    return torch.linalg.qr(torch.randn(n, n, generator=generator(4), dtype=F64))[0]


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("name", ["flat", "indefinite", "outliers over a bulk", "step", "many null", "zero"])
def test_it_is_a_density_with_the_right_moments(name: str, deflated: bool) -> None:
    A = with_spectrum(spectra(80)[name])
    deflate = eigsh(A, 4, rtol=1e-8, generator=generator(1)) if deflated else None
    density = spectral_density(A, num_probes=8, num_steps=20, generator=generator(), deflate=deflate)
    torch.testing.assert_close(density.weights.sum(dim=1), torch.ones(8, dtype=F64))
    assert abs(torch.trapezoid(density.density, density.grid) - 1) < 1e-3
    exact = torch.linalg.eigvalsh(A)
    for power in (1, 2):
        mean, stderr = density.expectation(lambda x, power=power: x**power)  # type: ignore[misc]
        assert abs(mean - (exact**power).mean()) <= 4 * stderr + 1e-9, power


def test_deflation_takes_the_outliers_out_of_the_error() -> None:
    A = with_spectrum(spectra(200)["outliers over a bulk"])
    top = eigsh(A, 3, rtol=1e-8, generator=generator(1))
    plain = spectral_density(A, num_probes=10, num_steps=20, generator=generator())
    deflated = spectral_density(A, num_probes=10, num_steps=20, generator=generator(), deflate=top)
    assert deflated.expectation(torch.abs)[1] < 0.1 * plain.expectation(torch.abs)[1]
    for eigenvalue in (50.0, 20.0, 10.0):
        at = (deflated.nodes - eigenvalue).abs() < 1e-6
        torch.testing.assert_close(deflated.weights[at], torch.full((10,), 1 / 200, dtype=F64))


def test_the_error_band_of_the_density_covers_at_its_rate() -> None:
    eigenvalues = torch.linspace(-1, 1, 12, dtype=F64)
    A = with_spectrum(eigenvalues)
    scores = []
    for seed in range(NUM_SEEDS):  # as many steps as eigenvalues: the probes are all the error
        density = spectral_density(
            A, num_probes=100, num_steps=12, generator=generator(seed), num_points=9, block_size=100, sigma=0.4
        )
        scores.append((density.density - smoothed(eigenvalues, density.grid, 0.4)) / density.stderr)
    z = torch.stack(scores)[:, 2:-2]  # in the tails single eigenvalues rule, whose share has a skewed distribution
    assert bool((z.mean(dim=0).abs() * NUM_SEEDS**0.5 < 4).all())
    assert bool(((z.std(dim=0) > 0.9) & (z.std(dim=0) < 1.1)).all())
    assert 0.93 < (z.abs() < 2).double().mean() < 0.98


def test_probes_side_by_side_give_the_numbers_of_one_at_a_time() -> None:
    A = with_spectrum(spectra(50)["indefinite"])
    alone = spectral_density(A, num_probes=7, num_steps=12, generator=generator(2))
    for block_size in (3, 7):
        counted = Counting(A)
        together = spectral_density(counted, num_probes=7, num_steps=12, generator=generator(2), block_size=block_size)
        assert together.num_matvecs == counted.num_matvecs == alone.num_matvecs
        torch.testing.assert_close(together.nodes, alone.nodes)
        torch.testing.assert_close(together.weights, alone.weights)


def test_bad_input_for_the_density() -> None:
    A = torch.eye(6)
    for arguments, message in [
        ({"num_probes": 0, "num_steps": 3}, "num_probes must be at least 1"),
        ({"num_probes": 2, "num_steps": 7}, r"num_steps must be in \[1, 6\], got 7"),
        ({"num_probes": 2, "num_steps": 3, "sigma": 0.0}, "sigma must be positive"),
        ({"num_probes": 2, "num_steps": 3, "num_points": 1}, "num_points must be at least 2"),
        ({"num_probes": 2, "num_steps": 3, "block_size": 0}, "block_size must be at least 1"),
        ({"num_probes": 2, "num_steps": 3, "probes": torch.ones(6, 3)}, r"probes must have shape \(6, 2\)"),
    ]:
        with pytest.raises(InputError, match=message):
            spectral_density(A, generator=generator(), **arguments)  # type: ignore[arg-type]
