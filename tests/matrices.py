"""Dense symmetric matrices with prescribed spectra, for testing numerics against `torch.linalg.eigh`."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.results import EigenPairs

F64 = torch.float64


def orthogonal(n: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    X = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.linalg.qr(X)[0]


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    Q = orthogonal(len(eigenvalues), seed)
    A = (Q * eigenvalues.to(F64)) @ Q.T
    return (A + A.T) / 2


def spectra(n: int) -> dict[str, Tensor]:
    """Spectra of every kind that a solver meets, by name."""
    i = torch.arange(n, dtype=F64)
    small = min(n, 10)
    return {
        "flat": torch.linspace(1, 3, n, dtype=F64),
        "polynomial": (i + 1) ** -2,
        "slow exponential": 0.9**i,
        "exponential": 0.7**i,
        "step": torch.where(i < small, 1.0, 1e-3).to(F64),
        "clustered": torch.cat([1 + 1e-3 * i[:small], torch.linspace(0, 0.9, n - small, dtype=F64)]),
        "repeated": torch.cat(
            [torch.tensor([5.0, 5.0, 5.0, 3.0, 3.0], dtype=F64), torch.linspace(0, 1, n - 5, dtype=F64)]
        ),
        "indefinite": torch.linspace(-1, 1, n, dtype=F64) ** 3,
        "mostly negative": torch.cat([torch.tensor([1.0, 0.5], dtype=F64), torch.linspace(-2, 0, n - 2, dtype=F64)]),
        "outliers over a bulk": torch.cat(
            [torch.tensor([50.0, 20.0, 10.0], dtype=F64), 0.1 * torch.randn(n - 3, generator=generator(1), dtype=F64)]
        ),
        "many null": torch.where(i < n // 4, 1.0 + i, 0.0),
        "multiple of the identity": torch.full((n,), 2.0, dtype=F64),
        "zero": torch.zeros(n, dtype=F64),
        "rank one": torch.where(i < 1, 3.0, 0.0).to(F64),
    }


def twenty_spectra(n: int) -> dict[str, Tensor]:
    """The spectra on which products are counted against ARPACK: decaying, clustered, repeated, indefinite, steps."""
    i = torch.arange(n, dtype=F64)
    noise = torch.randn(n, generator=generator(1), dtype=F64)
    wigner = torch.randn(n, n, generator=generator(2), dtype=F64)

    def top(values: list[float], low: float, high: float) -> Tensor:
        return torch.cat([torch.tensor(values, dtype=F64), torch.linspace(low, high, n - len(values), dtype=F64)])

    return {
        "uniform, definite": torch.linspace(1, 3, n, dtype=F64),
        "uniform, semi-definite": torch.linspace(0, 1, n, dtype=F64),
        "i^-1/2": (i + 1) ** -0.5,
        "i^-1": (i + 1) ** -1,
        "i^-2": (i + 1) ** -2,
        "0.99^i": 0.99**i,
        "0.9^i": 0.9**i,
        "0.7^i": 0.7**i,
        "step after 10": torch.where(i < 10, 1 + 1e-2 * i, 1e-3 * i / n),
        "step after 50": torch.where(i < 50, 1 + 1e-3 * i, 1e-2 * i / n),
        "cluster": top([1 + 1e-3 * j for j in range(10)], 0, 0.9),
        "two clusters": top([2 + 1e-2 * j for j in range(5)] + [1 + 1e-2 * j for j in range(5)], 0, 0.5),
        "threefold and twofold": top([5.0, 5.0, 5.0, 3.0, 3.0], 0, 1),
        "tenfold": top([2.0] * 10, 0, 1),
        "indefinite, cubed": torch.linspace(-1, 1, n, dtype=F64) ** 3,
        "semicircle": torch.linalg.eigvalsh((wigner + wigner.T) / (2 * n) ** 0.5),
        "mostly negative": top([1.0, 0.5], -2, -0.1),
        "outliers over a bulk": torch.cat([torch.tensor([50.0, 20.0, 10.0], dtype=F64), 0.1 * noise[3:]]),
        "like a Hessian": torch.cat([10 * 0.7 ** i[:10], 0.05 * noise[10:].abs() * torch.exp(-3 * i[10:] / n) - 0.01]),
        "many null": torch.where(i < n // 4, 1 + i / 10, 0),
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wanted(A: Tensor, k: int, which: str) -> Tensor:
    """The eigenvalues asked for, descending, by a dense solver."""
    exact = torch.linalg.eigvalsh(A.double()).flip(0)
    if which == "LA":
        return exact[:k]
    if which == "SA":
        return exact[len(exact) - k :]
    if which == "LM":
        return exact[exact.abs().argsort(descending=True)[:k]].sort(descending=True).values
    return torch.cat([exact[: k - k // 2], exact[len(exact) - k // 2 :]])


def true_residuals(A: Tensor, pairs: EigenPairs) -> Tensor:
    """|A u - lambda u| in float64."""
    U = pairs.eigenvectors.double()
    return (A.double() @ U - U * pairs.eigenvalues.double()).norm(dim=0)
