"""Which directions the gradient, the updates and the classes take, among those in which the loss is curved most.

Reference: Gur-Ari, Roberts and Dyer (2018), Gradient descent happens in a tiny subspace, arXiv 1812.04754; Song, Ahn
and Yun (2024), Does SGD really happen in tiny subspaces?, arXiv 2405.16002, for why a large share is not all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from analysis.alignment.results import GradientAlignment, SubspaceOverlap, VectorAlignment
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.generators import AnyGenerator
from curvature.linalg import eigsh
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.operators.hessian import HessianOperator

__all__ = ["gradient_alignment", "overlap_over_time", "subspace_overlap"]


@in_whole_vectors
@full_precision
@checked
def gradient_alignment(
    objective: Objective,
    k: int = 10,
    *,
    updates: Mapping[str, Tensor] | None = None,
    rtol: float = 1e-4,
    generator: AnyGenerator,
) -> GradientAlignment:
    """Return the share of the gradient in the span of the k top eigenvectors, and the curvature along it.

    Shares are not to be read by themselves: beside each stands what a random direction has, k / n, and how far the
    subspace may be off. g'Hg / |g|^2 against 2 / lr says whether a step along the gradient overshoots.

    Cost: one gradient, k + 1 eigenpairs (the next eigenvalue tells the gap), a product for g and each update.

    Args:
        objective: the loss at its point.
        k: eigenvectors, in [1, n].
        updates: further vectors by name, (n,), e.g. the step an optimizer took.
        rtol: residual of the eigenpairs.
        generator: source of the start, on the objective's device, or a seed.

    Raises:
        InputError: for arguments out of range.
        NotConvergedError: if the eigenpairs did not reach `rtol`.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 1.0]]))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, nn.MSELoss(), (x, torch.zeros(2, 1)))  # g = (1, 4), H = diag(1, 4)
        >>> found = gradient_alignment(objective, 1, generator=torch.Generator().manual_seed(0))
        >>> round(float(found.gradient.shares[0]), 4), round(found.gradient.rayleigh, 4)  # 16 / 17, 65 / 17
        (0.9412, 3.8235)
    """
    n = objective.num_params
    if not 1 <= k <= n:
        raise InputError(f"k must be in [1, {n}], got {k}.")
    for name, update in (updates or {}).items():
        if update.shape != (n,) or not bool(update.isfinite().all()):
            raise InputError(f"update {name!r} must be a finite vector of shape ({n},), got {tuple(update.shape)}.")
    gradient = objective.gradient()
    pairs = eigsh(objective, min(k + 1, n), rtol=rtol, generator=generator).raise_if_failed()
    values, residuals = pairs.eigenvalues.double().cpu(), pairs.residual_norms.double().cpu()
    U = pairs.eigenvectors[:, :k]
    vectors = {"gradient": gradient} | {name: u.to(gradient) for name, u in (updates or {}).items()}
    products = HessianOperator(objective) @ torch.stack(list(vectors.values()), dim=1)
    found = [
        _vector(name, x, Hx, U, gradient) for (name, x), Hx in zip(vectors.items(), products.unbind(1), strict=True)
    ]
    return GradientAlignment(
        num_params=n,
        eigenvalues=values[:k],
        gradient=found[0],
        updates=tuple(found[1:]),
        share_error=_share_errors(values, residuals, k, n),
        num_matvecs=pairs.num_matvecs + len(vectors),
    )


@full_precision
@checked
def subspace_overlap(U: Tensor, V: Tensor) -> SubspaceOverlap:
    """Return how much the spans of U (n, k) and V (n, k') have in common, beside what chance gives.

    With P, P' the projections, tr(P P') has mean k k' / n over random subspaces and variance
    2 k (n - k) k' (n - k') / (n^2 (n - 1) (n + 2)).

    Raises:
        InputError: for other shapes, or columns that are not linearly independent.
    """
    if U.ndim != 2 or V.ndim != 2 or len(U) != len(V) or 0 in (*U.shape, *V.shape):
        raise InputError(f"bases must be (n, k) and (n, k') over one n, got {tuple(U.shape)} and {tuple(V.shape)}.")
    n, k, m = len(U), U.shape[1], V.shape[1]
    Q, R = _orthonormal(U), _orthonormal(V)
    cosines = torch.linalg.svdvals(Q.T @ R.to(Q)).clamp(max=1).double().cpu()
    size = (k * m) ** 0.5
    variance = 2 * k * (n - k) * m * (n - m) / (n**2 * (n - 1) * (n + 2)) if n > 1 else 0.0
    return SubspaceOverlap(
        overlap=float(cosines.square().sum()) / size, chance=size / n, chance_std=variance**0.5 / size, cosines=cosines
    )


@full_precision
@checked
def overlap_over_time(bases: Sequence[Tensor]) -> Tensor:
    """Return the overlap of every pair of subspaces, (T, T): symmetric, 1 on the diagonal where all have one size.

    Args:
        bases: T bases (n, k_t), e.g. top eigenvectors at checkpoints in order of time.

    Raises:
        InputError: as `subspace_overlap`, or for none.
    """
    if not bases:
        raise InputError("bases must hold at least one basis.")
    rows = [
        [subspace_overlap(U, V).overlap if j >= i else 0.0 for j, V in enumerate(bases)] for i, U in enumerate(bases)
    ]
    upper = torch.tensor(rows, dtype=torch.float64)
    return upper + upper.triu(1).T


def _vector(name: str, x: Tensor, Hx: Tensor, U: Tensor, gradient: Tensor) -> VectorAlignment:
    x, Hx, g = x.double(), Hx.double(), gradient.double()
    square = float(x @ x)
    parts = (U.double().T @ x).square().cumsum(0).cpu()
    norms = square**0.5 * float(g.norm())
    return VectorAlignment(
        name=name,
        norm=square**0.5,
        shares=(parts / square).clamp(max=1) if square > 0 else torch.full_like(parts, torch.nan),
        rayleigh=float(x @ Hx) / square if square > 0 else math.nan,
        cosine=-float(x @ g) / norms if norms > 0 else math.nan,
    )


def _share_errors(values: Tensor, residuals: Tensor, k: int, n: int) -> Tensor:
    """Return |residuals|_F / gap for the first j pairs; the next eigenvalue may be higher by its residual."""
    errors = []
    for j in range(1, k + 1):
        size = float(residuals[:j].norm())
        if j == n:
            errors.append(0.0)
            continue
        gap = float(values[j - 1] - values[j] - residuals[j])
        errors.append(min(1.0, size / gap) if gap > 0 else 1.0)
    return torch.tensor(errors, dtype=torch.float64)


def _orthonormal(U: Tensor) -> Tensor:
    wide = U.double()
    Q, R = torch.linalg.qr(wide)
    diagonal = R.diagonal().abs()
    if U.shape[1] > len(U) or not bool((diagonal > len(U) * torch.finfo(U.dtype).eps * diagonal.max()).all()):
        raise InputError("the columns of a basis must be linearly independent; drop those that are not.")
    return Q
