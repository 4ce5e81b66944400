"""Cases of `bench_coverage` for the estimators of a symmetric matrix: nine spectra in a random basis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.conditioning.measure import _condition
from analysis.records.measured import Bounded
from benchmarks.coverage.cases import Case, Interval
from curvature import SpectrumPlan, spectrum
from curvature.linalg import count, diagonal, frobenius_norm, spectral_density, spectral_sum, trace
from curvature.results.estimates import SpectralDensity
from curvature.spectra.results import Spectrum

__all__ = [
    "SPECTRA",
    "condition_cases",
    "density_cases",
    "diagonal_cases",
    "frobenius_cases",
    "make_matrix",
    "nullity_cases",
    "rank_cases",
    "sum_cases",
    "trace_cases",
]

SIZE = 100


def _spectra() -> dict[str, np.ndarray]:
    n, r = SIZE, np.random.default_rng(0)
    i = np.arange(n)
    return {
        "power law": (i + 1.0) ** -1.5,
        "slow power law": (i + 1.0) ** -0.5,
        "geometric": 0.8**i,
        "step": np.where(i < 15, 1.0, 1e-4),
        "indefinite, outliers": np.concatenate([[30, 12, -8, 5], 0.3 * r.standard_normal(n - 4)]),
        "rank one + noise": np.where(i < 1, 7.0, 0) + 0.01 * r.standard_normal(n),
        "near identity": 1 + 1e-3 * r.standard_normal(n),
        "network": np.concatenate([100 * 0.7 ** i[:10], r.exponential(0.5, 45), -0.02 * r.exponential(size=n - 55)]),
        "tiny": np.array([3.0, 1.0, 0.5, 0.2, -0.1, 0.05]),
    }


SPECTRA = _spectra()
"""Eigenvalues by name; 100 each but for the last."""


def make_matrix(name: str, dtype: torch.dtype) -> Tensor:
    """Return the symmetric matrix with these eigenvalues in a random orthonormal basis."""
    eigenvalues = SPECTRA[name]
    X = np.random.default_rng(3).standard_normal((len(eigenvalues), len(eigenvalues)))
    Q = np.linalg.qr(X)[0]
    A = torch.tensor((Q * eigenvalues) @ Q.T)
    return ((A + A.T) / 2).to(dtype)


def _rounding(A: Tensor) -> float:
    return 20 * torch.finfo(A.dtype).eps * float(torch.linalg.matrix_norm(A.double(), "nuc"))


def trace_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield `trace` by all methods with budgets and accuracies."""
    settings: tuple[dict[str, Any], ...] = ({"num_matvecs": 12}, {"num_matvecs": 40}, {"rtol": 0.05})
    for name, eigenvalues in SPECTRA.items():
        A = make_matrix(name, dtype)
        for method in ("auto", "hutchinson", "hutch++", "xtrace", "xnystrace"):
            if method == "xnystrace" and eigenvalues.min() < 0:
                continue
            for how in settings if len(A) == SIZE else ({"num_matvecs": 4},):
                yield _trace_case(A, name, method, how)


def _trace_case(A: Tensor, name: str, method: Any, how: dict[str, Any]) -> Case:
    def run(seed: int) -> Interval:
        generator = torch.Generator().manual_seed(seed)
        found = trace(A, method=method, generator=generator, block_size=16, **how)
        return Interval.around(found.value, found.half_width(), products=found.num_matvecs)

    label = f"{100 * how['rtol']:g} %" if "rtol" in how else f"{how['num_matvecs']} products"
    return Case(f"{method}, {label}", name, A.double().trace(), run, _rounding(A))


def diagonal_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield `diagonal` by all methods; the share is that of all entries."""
    settings: tuple[dict[str, Any], ...] = ({"num_matvecs": 12}, {"num_matvecs": 40}, {"rtol": 0.2})
    for name in SPECTRA:
        A = make_matrix(name, dtype)
        for method in ("auto", "hutchinson", "xdiag"):
            for how in settings[: 2 if method == "hutchinson" else 3] if len(A) == SIZE else ({"num_matvecs": 4},):
                yield _diagonal_case(A, name, method, how)


def _diagonal_case(A: Tensor, name: str, method: Any, how: dict[str, Any]) -> Case:
    def run(seed: int) -> Interval:
        found = diagonal(A, method=method, generator=torch.Generator().manual_seed(seed), block_size=16, **how)
        return Interval.around(found.value, found.half_width(), products=found.num_matvecs)

    label = f"{100 * how['rtol']:g} %" if "rtol" in how else f"{how['num_matvecs']} products"
    return Case(f"{method}, {label}", name, A.double().diagonal(), run, _rounding(A) / len(A))


# -- from quadratures -------------------------------------------------------------------------------------------------

PROBES, STEPS = 4, 12
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": torch.square,
    "x / (x + top / 100)": lambda x: x.abs() / (x.abs() + 0.01),
}
"""Of the eigenvalues over the largest |eigenvalue|."""
FLOORS = (1e-2, 1e-5)


def _scaled(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a matrix of norm 1 and its eigenvalues, float64."""
    A = make_matrix(name, torch.float64)
    A = (A / torch.linalg.matrix_norm(A, ord=2)).to(dtype)
    return A, torch.linalg.eigvalsh(A.double())


@cache
def _spectrum(name: str, dtype: torch.dtype, seed: int) -> Spectrum:
    plan = SpectrumPlan(k=1, num_bottom=1, num_probes=PROBES, num_steps=STEPS, num_groups=0)
    return spectrum(_scaled(name, dtype)[0], plan, generator=torch.Generator().manual_seed(seed))


@cache
def _density(name: str, dtype: torch.dtype, seed: int) -> SpectralDensity:
    A, _ = _scaled(name, dtype)
    return spectral_density(
        A,
        num_probes=2 * PROBES,
        num_steps=min(STEPS, len(A)),
        block_size=2 * PROBES,
        generator=torch.Generator().manual_seed(seed),
    )


def sum_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield spectral sums from a block Krylov space, and from one Krylov space a probe."""
    for name in SPECTRA:
        A, values = _scaled(name, dtype)
        for label, f in FUNCTIONS.items():
            exact = f(values).sum()

            def whole(seed: int, name: str = name, f: Callable[[Tensor], Tensor] = f) -> Interval:
                found = _spectrum(name, dtype, seed)
                estimate = found.spectral_sum(f)
                low, high = torch.tensor(estimate.interval(), dtype=torch.float64)
                return Interval(estimate.value, low, high, found.num_matvecs)

            def single(seed: int, name: str = name, f: Callable[[Tensor], Tensor] = f) -> Interval:
                density = _density(name, dtype, seed)
                estimate = spectral_sum(density, f)
                return Interval(estimate.value, *estimate.interval(), density.num_matvecs)

            yield Case(f"spectrum, {label}", name, exact, whole, 100 * _rounding(A))
            yield Case(f"spectral_density, {label}", name, exact, single, 100 * _rounding(A))


def frobenius_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield |A|_F by `frobenius_norm` with budgets, and from a block Krylov space."""
    for name in SPECTRA:
        A, values = _scaled(name, dtype)
        exact = values.square().sum().sqrt()
        for num_matvecs in (12, 40) if len(A) == SIZE else (4,):

            def alone(seed: int, A: Tensor = A, num_matvecs: int = num_matvecs) -> Interval:
                found = frobenius_norm(A, num_matvecs=num_matvecs, generator=seed, block_size=16)
                return Interval.around(found.value, found.half_width(), products=found.num_matvecs)

            yield Case(f"{num_matvecs} products", name, exact, alone, 100 * _rounding(A))

        def of_spectrum(seed: int, name: str = name) -> Interval:
            found = _spectrum(name, dtype, seed)
            estimate = found.frobenius_norm()
            low, high = torch.tensor(estimate.interval(), dtype=torch.float64)
            return Interval(estimate.value, low, high, found.num_matvecs)

        yield Case("spectrum", name, exact, of_spectrum, 100 * _rounding(A))


def density_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield smoothed densities at the points of their grids where they are not negligible."""
    for name in SPECTRA:
        A, values = _scaled(name, dtype)

        def run(seed: int, name: str = name, values: Tensor = values) -> Interval:
            found = _density(name, dtype, seed)
            z = (found.grid[:, None] - values) / found.sigma
            exact = torch.exp(-z.square() / 2).mean(dim=1) / (found.sigma * (2 * torch.pi) ** 0.5)
            low, high = found.interval()
            chosen = torch.where(exact > 0.01 * exact.max(), 1.0, torch.nan)
            error = (found.density - exact) * chosen
            return Interval(error, low - exact, high - exact, found.num_matvecs)

        yield Case("spectral_density", name, torch.zeros(1024, dtype=torch.float64), run, 100 * _rounding(A))


def _bounded_cases(dtype: torch.dtype, of: str, exact: Callable[[Tensor, float], Tensor]) -> Iterator[Case]:
    for name in SPECTRA:
        values = _scaled(name, dtype)[1]
        for floor in FLOORS:

            def run(seed: int, name: str = name, floor: float = floor) -> Interval:
                found = _spectrum(name, dtype, seed)
                measured: Bounded = getattr(_condition(found, "whole", floor), of)
                value, lower, upper = torch.tensor(
                    [measured.value, measured.lower, measured.upper], dtype=torch.float64
                )
                return Interval(value, lower, upper, found.num_matvecs)

            size = values.abs()
            yield Case(f"floor {floor:g}", name, exact(size, floor * float(size.max())).double(), run, 1e-6)


def rank_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield numerical ranks of `conditioning`."""
    return _bounded_cases(dtype, "rank", lambda size, cut: (size > cut).sum())


def condition_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield condition numbers of `conditioning`."""
    return _bounded_cases(dtype, "condition", lambda size, cut: size.max() / size[size > cut].min())


def nullity_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield counts of eigenvalues within a tolerance of zero, by the rules of single probes."""
    for name in SPECTRA:
        values = _scaled(name, dtype)[1]
        for cut in FLOORS:

            def run(seed: int, name: str = name, cut: float = cut) -> Interval:
                density = _density(name, dtype, seed)
                found = count(density, -cut, cut)
                return Interval(found.value, *found.interval(), density.num_matvecs)

            exact = (values.abs() <= cut).sum().double()
            yield Case(f"tolerance {cut:g}", name, exact, run, 1e-6)
