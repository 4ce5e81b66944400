"""Dense symmetric matrices with prescribed spectra, for testing numerics against `torch.linalg.eigh`."""

from __future__ import annotations

import torch
from torch import Tensor

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


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
