"""Cases of `bench_coverage` for the estimators of a symmetric matrix: nine spectra in a random basis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.coverage import Case, Interval

__all__ = ["SPECTRA", "make_matrix", "trace_cases"]

SIZE = 200


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
        "network": np.concatenate([100 * 0.7 ** i[:10], r.exponential(0.5, 90), -0.02 * r.exponential(size=n - 100)]),
        "tiny": np.array([3.0, 1.0, 0.5, 0.2, -0.1, 0.05]),
    }


SPECTRA = _spectra()
"""Eigenvalues by name; 200 each but for the last."""


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
    settings: tuple[dict[str, Any], ...] = ({"num_matvecs": 12}, {"num_matvecs": 40}, {"rtol": 0.05}, {"rtol": 0.01})
    for name, eigenvalues in SPECTRA.items():
        A = make_matrix(name, dtype)
        for method in ("auto", "hutchinson", "hutch++", "xtrace", "xnystrace"):
            if method == "xnystrace" and eigenvalues.min() < 0:
                continue
            for how in settings if len(A) == SIZE else ({"num_matvecs": 4},):
                yield _trace_case(A, name, method, how)


def _trace_case(A: Tensor, name: str, method: str, how: dict[str, Any]) -> Case:
    from curvature.linalg import trace

    def run(seed: int) -> Interval:
        generator = torch.Generator().manual_seed(seed)
        found = trace(A, method=method, generator=generator, block_size=16, **how)
        return Interval.around(found.value, found.half_width, products=found.num_matvecs)

    label = f"{100 * how['rtol']:g} %" if "rtol" in how else f"{how['num_matvecs']} products"
    return Case(f"{method}, {label}", name, A.double().trace(), run, _rounding(A))
