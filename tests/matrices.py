"""Dense symmetric matrices with prescribed spectra, for testing numerics against `torch.linalg.eigh`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from curvature.linalg import eigsh
from curvature.results.estimates import EigenPairs

F64 = torch.float64
lanczos_pairs = partial(eigsh, method="lanczos")


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


def hard_matrices(n: int) -> dict[str, Tensor]:
    """Matrices on which Krylov methods lose copies or members of clusters, beside those of the other two lists."""
    i = torch.arange(n, dtype=F64)
    ones, half, side = torch.ones(n - 1, dtype=F64), n // 2, int(n**0.5)

    def tridiagonal(diagonal: Tensor, off: Tensor) -> Tensor:
        return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)

    laplacian = tridiagonal(torch.full((n,), 2.0, dtype=F64), -ones)
    small, eye = laplacian[:side, :side], torch.eye(side, dtype=F64)
    hypercube = torch.zeros(64, 64, dtype=F64)
    for a in range(64):
        for bit in range(6):
            hypercube[a, a ^ (1 << bit)] = 1
    arrow = torch.diag(i)
    arrow[0, 1:] = arrow[1:, 0] = 1
    middle = torch.linspace(1, 2, half, dtype=F64)
    kinds = twenty_spectra(n)
    return {
        **{name: with_spectrum(values) for name, values in spectra(n).items()},
        **{f"{name}, again": with_spectrum(kinds[name], 1) for name in ("tenfold", "cluster", "two clusters")},
        "two narrow clusters": with_spectrum(torch.cat([1 + 1e-6 * i[:half], 2 + 1e-6 * i[: n - half]])),
        "two eigenvalues": with_spectrum(torch.where(i < half, 1.0, 2.0)),
        "signs": with_spectrum(torch.where(i < half, 1.0, -1.0)),
        "nearly signs": with_spectrum(torch.where(i < half, 1.0, -1.0) + 1e-7 * torch.sin(i)),
        "sinc": torch.sinc((i[:, None] - i) / 2) / 2,
        "Wilkinson": tridiagonal((i - (n - 1) / 2).abs(), ones),
        "Hilbert": 1 / (i[:, None] + i + 1),
        "Laplacian": laplacian,
        "Laplacian of a square": torch.kron(small, eye) + torch.kron(eye, small),
        "graded": with_spectrum(10.0 ** (-16 * i / (n - 1))),
        "rank 5": with_spectrum((5 - i).clamp_min(0)),
        "rank 5, equal": with_spectrum((i < 5).to(F64)),
        "half null": with_spectrum(torch.where(i < half, 1 + i / n, 0)),
        "four copies": torch.kron(torch.eye(4, dtype=F64), with_spectrum(torch.linspace(-1, 1, n // 4, dtype=F64))),
        "hypercube": hypercube,
        "identity and rank one": torch.eye(n, dtype=F64) + 1 / n,
        "arrow": arrow,
        "null block": torch.block_diag(with_spectrum(middle), torch.zeros(n - half, n - half, dtype=F64)),
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


def missed(A: Tensor, pairs: EigenPairs, which: str, rtol: float) -> bool:
    """Whether an eigenvalue is not among the pairs although it lies beyond the last by more than the tolerance."""
    exact, found = wanted(A, len(pairs.eigenvalues), which), pairs.eigenvalues.double()
    if which == "LM":
        exact, found = exact.abs().sort().values, found.abs().sort().values
    norm = float(torch.linalg.matrix_norm(A.double(), 2))
    floor = max(10 * torch.finfo(A.dtype).eps, 1e4 * torch.finfo(F64).eps) * norm
    return bool(((found - exact).abs() > 2 * (rtol * exact.abs()).clamp_min(floor)).any())


def true_residuals(A: Tensor, pairs: EigenPairs) -> Tensor:
    """|A u - lambda u| in float64."""
    U = pairs.eigenvectors.double()
    return (A.double() @ U - U * pairs.eigenvalues.double()).norm(dim=0)
