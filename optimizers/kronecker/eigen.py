"""Eigenbases of Kronecker factors: symmetric, positive semi-definite, as ill-conditioned as gradients make them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eigenbasis", "improved_basis"]


def eigenbasis(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues (n,), descending and not negative, and eigenvectors as columns, in the dtype of the factor.

    The factor is scaled to entries of at most 1 first. Where LAPACK or the GPU's solver gives up on it, it is tried in
    float64, and then with 1e-12 of its largest entry on the diagonal.

    Returns:
        None where the factor is not finite or all of that failed: go on with the basis that there is.
    """
    largest = factor.abs().amax()
    scaled = (factor / largest.clamp(min=torch.finfo(factor.dtype).tiny)).to(dtype)
    for attempt in (scaled, scaled.double(), scaled.double() + 1e-12 * torch.eye(len(scaled)).to(scaled.device)):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(vectors.sum().isfinite()):
            values = values.clamp(min=0).to(factor.dtype) * largest
            return values.flip(0), vectors.flip(1).to(factor.dtype)
    return None


def improved_basis(factor: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return (order, basis) after a step of orthogonal iteration from a basis, whose columns were put in that order.

    One product and a QR decomposition. `order` sorts the old columns by their Rayleigh quotients, descending, so that
    iteration converges column by column. Householder's Q is orthogonal whatever the factor's rank.

    Returns:
        None where the result is not finite: go on with the basis that there is.
    """
    scaled = factor / factor.abs().amax().clamp(min=torch.finfo(factor.dtype).tiny)
    product = scaled.to(dtype) @ basis.to(dtype)
    order = (basis * product).sum(0).argsort(descending=True)
    improved = torch.linalg.qr(product[:, order]).Q
    return (order, improved.to(factor.dtype)) if bool(improved.sum().isfinite()) else None
