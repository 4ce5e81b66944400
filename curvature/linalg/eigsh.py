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
    basis_dtype: torch.dtype | None = None,
    certify: bool = False,
    callback: Callable[[int, str], None] | None = None,
) -> EigenPairs:
    """Return k eigenpairs of a symmetric matrix, with residuals |A u - lambda u| <= max(rtol |lambda|, atol).

    The tolerance has a floor at rounding, 10 eps |A|, so that zero eigenvalues converge too. Eigenvalues that are small
    beside |A|, as at the low end of a Hessian's spectrum, want an `atol`: relative to themselves they cost dearly. An
    eigenvalue that is repeated more than `block_size` times is sure to be found in full only if its Krylov space is
    exhausted; clusters that are merely close are no problem.

    A basis in a narrower `basis_dtype` holds what its rounding allows: residuals of 0.2 eps |A| as a rule and eps |A|
    at worst, and values that err by the square of that over the gap. Measured with the spectra of tests/matrices.py,
    n = 120 and 400, k = 1 and 6, as shares of |A|: median (largest) of the largest residual of a result, and of the
    largest distance of a value from the nearest eigenvalue:

        basis      residual           distance
        bfloat16   2e-3   (7e-3)      1e-5   (7e-4)
        float16    2e-4   (6e-4)      2e-7   (6e-6)
        float32    4e-8   (1e-7)      2e-15  (4e-14)

    The pairs are multiplied once more and their residuals computed; where these miss the tolerance because of the
    basis, the status is STAGNATED. That a Krylov space is exhausted is seen less surely through rounding: of an
    eigenvalue repeated more than `block_size` times copies may be missing (in half of 72 runs on integer spectra).

    Cost: one product a step, 20 to 80 for the top of a typical Hessian; 8 n m operations a step for the basis. Memory:
    `num_basis` + `block_size` vectors, and those of `deflate`, that no `basis_dtype` narrows; 4 k more at the end with
    a narrower basis, of which the k of the result stay. A run that is to be saved and taken up again is a
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
        basis_dtype: in what the basis is held: bfloat16, float16 or float32 below the working dtype, that of A or
            float32. Products and sums stay in the working dtype, at about twice the time. It implies `certify`.
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
        >>> eigsh(A, 2, rtol=1e-4, generator=torch.Generator().manual_seed(0)).eigenvalues.round(decimals=3)
        tensor([99., 98.])
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
        basis_dtype=basis_dtype,
        certify=certify,
        callback=callback,
    )
    return solver.run(max_matvecs=max_matvecs)
