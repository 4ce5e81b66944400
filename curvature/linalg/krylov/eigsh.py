"""Some eigenpairs of a symmetric matrix by thick-restart Lanczos, in bounded memory: the function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.one_matrix import one_matrix
from curvature.linalg.krylov.thick_restart import ThickRestartLanczos, Which
from curvature.linop import MatrixLike
from curvature.results.estimates import EigenPairs

__all__ = ["eigsh"]


@full_precision
@one_matrix
@checked
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
    confidence: float | None = 0.99,
    callback: Callable[[int, str], None] | None = None,
) -> EigenPairs:
    """Return k eigenpairs of a symmetric matrix, with residuals |A u - lambda u| <= max(rtol |lambda|, atol).

    The tolerance has a floor at rounding, 10 eps |A|, so that zero eigenvalues converge too. Eigenvalues that are small
    beside |A|, as at the low end of a Hessian's spectrum, want an `atol`: relative to themselves they cost dearly.

    Small residuals do not show that these are the k largest: a cluster or a repeated eigenvalue looks like one from a
    single start. CONVERGED therefore means that no eigenvalue beyond the last one returned by more than its tolerance
    (or 1e4 eps |A|) was missed, with probability `confidence`: a Lanczos chain from a random direction outside the
    basis bounds the chance of a miss, and what it finds joins the basis (`curvature.linalg.krylov._completeness`). For
    eigenvectors orthogonal to the basis the bound is exact, for others empirical. It takes 3 to 15 products more on the
    spectra of trained networks. Where the limit of products or memory ends the chain, the status is UNCERTIFIED.

    A basis in a narrower `basis_dtype` holds what its rounding allows: residuals of 0.2 eps |A| as a rule and eps |A|
    at worst, and values that err by the square of that over the gap. Measured with the spectra of tests/matrices.py,
    n = 120 and 400, k = 1 and 6, as shares of |A|: median (largest) of the largest residual of a result, and of the
    largest distance of a value from the nearest eigenvalue:

        basis      residual           distance
        bfloat16   2e-3   (7e-3)      1e-5   (7e-4)
        float16    2e-4   (6e-4)      2e-7   (6e-6)
        float32    4e-8   (1e-7)      2e-15  (4e-14)

    The pairs are multiplied once more and their residuals computed; where these miss the tolerance because of the
    basis, the status is STAGNATED.

    Cost: one product a step, 20 to 80 for the top of a typical Hessian; 8 n m operations a step for the basis. Memory:
    `num_basis` + `block_size` + 4 vectors, or up to 256 MiB if the chain needs more, and those of `deflate`, that no
    `basis_dtype` narrows; 4 k more at the end with a narrower basis, of which the k of the result stay. A run that is
    to be saved and taken up again is a `ThickRestartLanczos`.

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
        certify: multiply every pair once more at the end, k products, and report residuals that were computed, not
            inferred from the recurrence. By default one product with a random combination of all pairs checks the
            recurrence, and only where it disagrees are all of them multiplied.
        confidence: probability with which no eigenvalue may be missed, between 0 and 1. None does without the chain and
            the product that checks residuals: CONVERGED then speaks of residuals only.
        callback: called after each product with the products so far and a word on progress.

    Returns:
        Eigenpairs, eigenvalues descending; `miss_probability` is the bound that was reached. With a status other than
        CONVERGED, the best that was reached.

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
        confidence=confidence,
        callback=callback,
    )
    return solver.run(max_matvecs=max_matvecs)
