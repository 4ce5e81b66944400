"""Eigenbases of Kronecker factors: symmetric, positive semi-definite, as ill-conditioned as gradients make them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from curvature.environment.device import is_gpu

__all__ = ["DTYPES", "SHIFT", "eigenbasis", "improved_basis", "restarted_if_overflown"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SHIFT = 0.2
"""Of a continuous iteration, in mean eigenvalues of the factor."""
_ALIGNED, _PADDING = 256, 16
"""Columns of a multiple of so many entries fall into few sets of a processor's cache, and LAPACK's QR takes 1.2 to 1.4
times as long: an identity of so many rows beside the matrix sets them apart."""


def eigenbasis(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues (n,), descending and not negative, and eigenvectors as columns, in the dtype of the factor.

    The factor is scaled to entries of at most 1 first. Where LAPACK or the GPU's solver gives up on it, it is tried in
    float64, and then with 1e-12 of its largest entry on the diagonal.

    Returns:
        None where the factor is not finite or all of that failed: go on with the basis that there is.
    """
    scaled, largest = _scaled(factor, dtype)
    for attempt in (scaled, scaled.double(), scaled.double() + 1e-12 * torch.eye(len(scaled), device=scaled.device)):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(vectors.sum().isfinite()):
            values = values.clamp(min=0).to(factor.dtype) * largest
            return values.flip(0), vectors.flip(1).to(factor.dtype)
    return None


def improved_basis(
    factor: Tensor, basis: Tensor, dtype: torch.dtype, *, continuous: bool = False
) -> tuple[Tensor, Tensor | None] | None:
    """Return the basis after a step of orthogonal iteration, and the order in which the old columns were taken.

    One product and a QR decomposition, whose Q is orthogonal whatever the factor's rank. Columns are taken by their
    Rayleigh quotients, descending, so that iteration converges column by column.

    Args:
        factor: (n, n).
        basis: orthogonal, (n, n).
        dtype: of the product and the decomposition.
        continuous: make the result a continuous function of factor and basis: columns keep their order, which else
            jumps where two quotients cross, and a multiple of the identity is added, which holds on to the old columns
            where the factor is zero up to rounding. It converges more slowly.

    Returns:
        None where the result is not finite: go on with the basis that there is.
    """
    scaled, _ = _scaled(factor, dtype)
    old = basis.to(dtype)
    product = scaled @ old
    order = None
    if continuous:
        product.add_(old * scaled.diagonal().mean(), alpha=SHIFT)
    else:
        order = (old * product).sum(0).argsort(descending=True)
        product = product[:, order]
    improved = _orthogonal(product)
    return (improved.to(factor.dtype), order) if bool(improved.sum().isfinite()) else None


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return Q of the QR decomposition of a square matrix."""
    n = len(matrix)
    if is_gpu(matrix.device) or n == 0 or n % _ALIGNED:
        return torch.linalg.qr(matrix).Q
    padded = torch.block_diag(matrix, torch.eye(_PADDING, dtype=matrix.dtype, device=matrix.device))
    return torch.linalg.qr(padded).Q[:n, :n]


def restarted_if_overflown(factor: Tensor) -> bool:
    """Set a factor that is not finite to zero, with a warning, and say so: it would stay what it is for good."""
    if bool(factor.sum().isfinite()):
        return False
    warnings.warn(
        f"a factor of size {len(factor)} has overflown {factor.dtype}, by gradients whose squares do, and is started "
        "anew: clip gradients.",
        stacklevel=2,
    )
    factor.zero_()
    return True


def _scaled(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the factor with entries of at most 1, and its largest entry."""
    largest = factor.abs().amax()
    return (factor / largest.clamp(min=torch.finfo(factor.dtype).tiny)).to(dtype), largest
