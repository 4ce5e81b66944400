"""Counts of eigenvalues from one Krylov space, against the eigenvalues themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from curvature.linalg.stochastic._mass_bounds import mass_below
from curvature.spectra.counts import count_between, smallest_beyond
from curvature.spectra.spectrum import spectrum
from curvature.spectra.spectrum_plan import SpectrumPlan
from tests.matrices import F64, generator, spectra, with_spectrum

N = 80
KINDS: dict[str, Tensor] = {
    "log-spaced over twelve decades": torch.logspace(0, -12, N, dtype=F64),
    "gap above zero": torch.cat([torch.logspace(0, -3, 30, dtype=F64), torch.zeros(N - 30, dtype=F64)]),
    "rank below the space": torch.cat([torch.linspace(1, 5, 8, dtype=F64), torch.zeros(N - 8, dtype=F64)]),
    "definite": torch.linspace(1e-2, 1, N, dtype=F64),
    "indefinite": spectra(N)["indefinite"],
    "outliers over a bulk": spectra(N)["outliers over a bulk"],
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", KINDS)
def test_ranks_and_smallest_eigenvalues_lie_between_their_bounds(name: str, dtype: torch.dtype) -> None:
    values = KINDS[name]
    A = with_spectrum(values).to(dtype)
    size = torch.linalg.eigvalsh(A.double()).abs()
    plan = SpectrumPlan(k=1, num_bottom=1, num_probes=4, num_steps=6, num_groups=0)
    for floor in (1e-5, 1e-2):
        cut = floor * float(size.max())
        rank, smallest = int((size > cut).sum()), float(size[size > cut].min())
        covered = 0
        for seed in range(6):
            found = spectrum(A, plan, generator=generator(seed))
            assert not found.exact
            near = count_between(found, -cut, cut)
            low, high = near.interval()
            covered += low - 1e-6 <= N - rank <= high + 1e-6
            assert near.at_least <= N - rank <= near.at_most
            least, most = smallest_beyond(found, cut)
            assert least <= smallest * (1 + 1e-3) + found.rounding
            assert most >= smallest * (1 - 1e-3) - found.rounding
        assert covered >= 5


def test_a_space_that_holds_the_range_bounds_the_smallest_eigenvalue_from_both_sides() -> None:
    A = with_spectrum(KINDS["rank below the space"])
    plan = SpectrumPlan(k=1, num_bottom=1, num_probes=4, num_steps=8, num_groups=0)
    least, most = smallest_beyond(spectrum(A, plan, generator=generator()), 5e-6)
    assert (least, most) == pytest.approx((1, 1), rel=1e-6)


def test_with_all_entries_counts_are_exact_and_open_at_eigenvalues_within_rounding() -> None:
    A = torch.diag(torch.tensor([3.0, 2.0, 1e-16, -1.0], dtype=F64))
    found = spectrum(A, SpectrumPlan(k=1, num_bottom=1), generator=generator())
    assert found.exact
    assert count_between(found, -1.5, 2.5).interval() == (3, 3)
    assert count_between(found, -math.inf, 0.0).interval() == (1, 2)
    assert count_between(found).interval() == (4, 4)
    assert smallest_beyond(found, 0.5) == (1, 1)


def test_mass_bounds_are_those_of_chebyshev_markov_and_stieltjes() -> None:
    """Of the uniform distribution on [-1, 1] from its first moments, and attained: by the rule with a node at 0."""
    legendre = torch.linalg.eigh(torch.diag(torch.tensor([i / (4 * i * i - 1) ** 0.5 for i in range(1, 3)]), 1).mH)
    nodes, weights = legendre.eigenvalues.double(), legendre.eigenvectors[0].double().square()
    lower, upper = mass_below(nodes, weights, torch.tensor([0.0, -2.0, math.inf], dtype=F64), num_steps=3)
    assert lower.tolist() == pytest.approx([5 / 18, 0, 1], abs=1e-6)  # Gauss-Legendre: 5/18, 8/18, 5/18
    assert float(upper[0]) == pytest.approx(13 / 18, abs=1e-6)
    # a block rule has more nodes than its degree warrants: the bounds are those of the degree, not of the nodes
    fine = torch.linspace(-1, 1, 2001, dtype=F64)
    lower, upper = mass_below(fine, torch.full_like(fine, 1 / 2001), torch.zeros(1, dtype=F64), num_steps=3)
    assert (float(lower[0]), float(upper[0])) == pytest.approx((5 / 18, 13 / 18), abs=1e-3)


def test_what_is_certain_corrects_what_probes_suggest() -> None:
    """Fifteen eigenvalues of 1, found one by one with rounding: the space proves them, the probes' weights see ten."""
    A = with_spectrum(torch.where(torch.arange(100) < 15, 1.0, 1e-4)).to(torch.float32)
    plan = SpectrumPlan(k=1, num_bottom=1, num_probes=4, num_steps=12, num_groups=0)
    for seed in range(12):
        number = count_between(spectrum(A, plan, generator=generator(seed)), 0.01)
        low, high = number.interval()
        assert number.at_least <= low <= high <= number.at_most
        assert number.at_least <= number.value <= number.at_most
