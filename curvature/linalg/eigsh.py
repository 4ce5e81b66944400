"""Some eigenpairs of a symmetric matrix by thick-restart Lanczos, in bounded memory: the function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.linalg.thick_restart import ThickRestartLanczos, Which
from curvature.linop import MatrixLike
from curvature.results import EigenPairs

__all__ = ["eigsh"]


def eigsh(
    A: MatrixLike,
    k: int,
    *,
    which: Which = "LA",
    rtol: float = 1e-3,
    atol: float = 0.0,
    max_matvecs: int | None = None,
    v0: Tensor | None = None,
    generator: torch.Generator,
    num_basis: int | None = None,
    block_size: int = 1,
    deflate: EigenPairs | Tensor | None = None,
    basis_device: torch.device | str | None = None,
    certify: bool = False,
    callback: Callable[[int, str], None] | None = None,
) -> EigenPairs:
    """Return k eigenpairs of a symmetric matrix, with residuals |A u - lambda u| <= max(rtol |lambda|, atol).

    The tolerance has a floor at rounding, 10 eps |A|, so that zero eigenvalues converge too. Eigenvalues that are small
    beside |A|, as at the low end of a Hessian's spectrum, want an `atol`: relative to themselves they cost dearly. An
    eigenvalue that is repeated more than `block_size` times is sure to be found in full only if its Krylov space is
    exhausted; clusters that are merely close are no problem.

    Cost: one product a step, 20 to 80 for the top of a typical Hessian; 8 n m operations a step for the basis. Memory:
    `num_basis` + `block_size` vectors, and those of `deflate`. A run that is to be saved and taken up again is a
    `ThickRestartLanczos`.

    Args:
        A: symmetric, (n, n).
        k: number of pairs, in [1, n].
        which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" k // 2 from the low end and the
            rest from the high end.
        rtol: tolerance of the residuals relative to the eigenvalue; positive.
        atol: tolerance of the residuals in units of A, where that is larger.
        max_matvecs: most products to spend. Default: 10 n, at least 1000.
        v0: start vector (n,) or block (n, p), e.g. the eigenvectors of a nearby matrix. Default: random.
        generator: for the start and for directions after a breakdown; on A's device.
        num_basis: vectors held, more than k + block_size. Default: max(2 k + 1, 20), or more for a wide start block.
        block_size: columns a product takes.
        deflate: eigenvectors that are known, as pairs (the converged ones are used) or orthonormal columns (n, p); the
            answer is orthogonal to them. What they lack in accuracy shows in the residuals.
        basis_device: where the basis is held, "cpu" for one that does not fit beside the model. Default: A's device.
        certify: multiply the pairs once more at the end, k products, and report residuals that were computed, not
            inferred from the recurrence.
        callback: called after each product with the products so far and a word on progress.

    Returns:
        Eigenpairs, eigenvalues descending. With a status other than CONVERGED, the best that was reached.

    Raises:
        InputError: for arguments out of range.
        NonFiniteError: if a product is not finite.

    Example:
        >>> A = torch.diag(torch.arange(100.0))
        >>> eigsh(A, 2, rtol=1e-4, generator=torch.Generator().manual_seed(0)).eigenvalues
        tensor([99.0000, 98.0000])
    """
    solver = ThickRestartLanczos(
        A,
        k,
        which=which,
        rtol=rtol,
        atol=atol,
        v0=v0,
        generator=generator,
        num_basis=num_basis,
        block_size=block_size,
        deflate=deflate,
        basis_device=basis_device,
        certify=certify,
        callback=callback,
    )
    return solver.run(max_matvecs=max_matvecs)
