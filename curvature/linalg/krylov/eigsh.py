"""Some eigenpairs of a symmetric matrix: the front of all the ways to them.

References: Wu and Simon (2000), for thick-restart Lanczos; Knyazev (2001), for LOBPCG; Haynsworth (1968), for what
shows that no eigenvalue was missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.checkpoint import AnyCheckpoint, Checkpoint, open_run
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.places import BasisDevice, place_of
from curvature.linalg.base.validate import check_count, check_square, product_noise, with_noise, working_dtype
from curvature.linalg.krylov._ritz_selection import Which, expected_matvecs, wanted
from curvature.linalg.krylov.lobpcg import lobpcg
from curvature.linalg.krylov.thick_restart import ThickRestartLanczos
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix, to_dense
from curvature.results.estimates import EigenPairs, Status

EigenMethod: TypeAlias = Literal["auto", "dense", "lanczos", "lobpcg"]
_WIDTHS = (1, 2, 4, 8)  # wider blocks take more products than they save
_WORTH = 0.85  # of the cost of single products that a block must promise: where few are needed, blocks waste more
_DENSE = 1000  # tensors up to this size are decomposed


@numerics
def eigsh(
    A: AnyMatrix,
    k: int,
    *,
    matrix: MatrixName = "hessian",
    which: Which = "LA",
    rtol: float = 1e-3,
    atol: float = 0.0,
    method: EigenMethod = "auto",
    block_size: int | None = None,
    num_basis: int | None = None,
    v0: Tensor | None = None,
    preconditioner: MatrixLike | None = None,
    deflate: EigenPairs | Tensor | None = None,
    max_matvecs: int | None = None,
    basis_device: BasisDevice = None,
    basis_dtype: torch.dtype | None = None,
    certify: bool = False,
    confidence: float | None = 0.99,
    generator: AnyGenerator,
    callback: Callable[[int, str], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> EigenPairs:
    """Return k eigenpairs of a symmetric matrix, with residuals |A u - lambda u| <= max(rtol |lambda|, atol).

    All entries are computed where that takes no more products than an iteration; LOBPCG runs where there is a
    preconditioner; thick-restart Lanczos everywhere else. It multiplies blocks where columns share work that is worth
    it, as those of an objective whose graphs are not kept do; the same generator gives the same bits.

    The tolerance has a floor at rounding, 10 eps |A|, so that zero eigenvalues converge too. Eigenvalues that are small
    beside |A|, as at the low end of a Hessian's spectrum, want an `atol`: relative to themselves they cost dearly.

    Small residuals do not show that these are the k largest: a cluster or a repeated eigenvalue looks like one from a
    single start. CONVERGED therefore means that no eigenvalue beyond the last one returned by more than its tolerance
    (or 1e4 eps |A|) was missed, with probability `confidence`: a Lanczos chain from a random direction outside the
    basis bounds the chance of a miss, and what it finds joins the basis (`curvature.linalg.krylov._completeness`). For
    eigenvectors orthogonal to the basis the bound is exact, for others empirical. It takes 3 to 15 products more on the
    spectra of trained networks. Where the limit of products or memory ends the chain, the status is UNCERTIFIED.

    A basis in a narrower `basis_dtype` holds what its rounding allows: residuals of 0.2 eps |A| as a rule and eps |A|
    at worst, and values that err by the square of that over the gap. Median (largest) of the largest residual and of
    the largest distance of a value from an eigenvalue, in |A|, for the spectra of tests/matrices.py, n = 120 and 400,
    k = 1 and 6: bfloat16 2e-3 (7e-3) and 1e-5 (7e-4); float16 2e-4 (6e-4) and 2e-7 (6e-6); float32 4e-8 (1e-7) and
    2e-15 (4e-14). The pairs are multiplied once more; where residuals miss the tolerance because of the basis, the
    status is STAGNATED.

    Cost: one product a step, 20 to 80 for the top of a typical Hessian; 8 n m operations a step for the basis. Memory:
    num_basis + block_size + 4 vectors, or up to 256 MiB if the chain needs more, and those of `deflate`, that no
    `basis_dtype` narrows; 4 k more at the end with a narrower basis, of which the k of the result stay. A run that is
    to be looked at and continued is a `ThickRestartLanczos`.

    Args:
        k: number of pairs, in [1, n].
        which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" k // 2 from the low end and the
            rest from the high end.
        rtol: tolerance of the residuals relative to the eigenvalue; positive.
        atol: tolerance of the residuals in units of A, where that is larger.
        method: "dense", "lanczos" or "lobpcg" fixes the choice.
        block_size: columns that Lanczos multiplies at a time. Default: chosen.
        num_basis: vectors that Lanczos holds, more than k + block_size. Default: max(2 k + 1, 20), or more for blocks.
        preconditioner: symmetric positive definite (n, n), near the inverse of |A - lambda I|, for LOBPCG.
        max_matvecs: most products to spend. Default: 10 n, at least 1000.
        v0: start vector (n,) or block (n, p), e.g. the eigenvectors of a nearby matrix. Default: random.
        deflate: eigenvectors that are known, as pairs (the converged ones are used) or orthonormal columns (n, p); the
            answer is orthogonal to them. What they lack in accuracy shows in the residuals.
        basis_device: where the basis is held: "cpu" for one that does not fit beside the model on a device, "disk" for
            one that does not fit into memory, in a temporary file that goes with the call. Default: A's device.
        basis_dtype: in what the basis is held: bfloat16, float16 or float32 below the working dtype, that of A or
            float32. Products and sums stay in the working dtype, at about twice the time. It implies `certify`.
        certify: multiply every pair once more at the end, k products, and report residuals that were computed, not
            inferred from the recurrence. By default one product with a random combination of all pairs checks the
            recurrence. What it is off by beyond rounding is added to the residuals, and pairs that miss the tolerance
            with it are multiplied; all are where that is more than sums in this dtype leave.
        confidence: probability with which no eigenvalue may be missed, between 0 and 1. None does without the chain and
            the product that checks residuals: CONVERGED then refers to residuals only.

    Returns:
        Eigenpairs, eigenvalues descending; `method` says what was chosen, and why, and `miss_probability` is the bound
        that was reached. With a status other than CONVERGED, the best that was reached.

    Raises:
        InputError: for arguments out of range or at odds, or a basis that does not fit into memory.

    Examples:
        >>> A = torch.diag(torch.arange(100.0))
        >>> pairs = eigsh(A, 2, generator=0)
        >>> pairs.eigenvalues, pairs.method
        (tensor([99., 98.]), 'all entries: the matrix is given by them')
    """
    saved = open_run("eigsh", locals())
    A = as_matrix(A, matrix)
    n = check_square(A)
    generator = as_generator(generator, A.device)
    check_count("k", k, 1, n)
    place_of(basis_device, A.device)
    for name, value, allowed in (("method", method, EigenMethod), ("which", which, Which)):
        if value not in get_args(allowed):
            raise InputError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}.")
    if preconditioner is not None and method not in ("auto", "lobpcg"):
        raise InputError(f'a preconditioner serves method="lobpcg" only, got method={method!r}.')
    if deflate is not None and (method in ("dense", "lobpcg") or preconditioner is not None):
        raise InputError(
            'deflate serves method="lanczos" only; leave the preconditioner out, or pass the vectors in v0.'
        )
    common: dict[str, Any] = {"which": which, "rtol": rtol, "atol": atol, "v0": v0, "generator": generator}
    common |= {"certify": certify, "confidence": confidence}
    chosen, why = method, "as asked for"
    iterated = expected_matvecs(k)
    if method == "auto":
        free = isinstance(A, Tensor) and n <= _DENSE
        few = n <= iterated and v0 is None and (max_matvecs is None or n <= max_matvecs)
        if preconditioner is not None:
            chosen, why = "lobpcg", "there is a preconditioner"
        elif deflate is None and (free or few):
            priced = f"{n} products, where an iteration takes about {iterated}"
            chosen, why = "dense", "the matrix is given by them" if free else priced
        else:
            chosen, why = "lanczos", f"about {iterated} products of {n}"
    if chosen == "dense":
        return _dense(A, k, which, rtol, atol, f"all entries: {why}", saved)
    if chosen == "lobpcg":
        if checkpoint is not None:
            raise InputError(
                'checkpoint serves method="lanczos" and "dense", and this run is one of LOBPCG; leave it out.'
            )
        pairs = lobpcg(A, k, preconditioner=preconditioner, max_matvecs=max_matvecs, callback=callback, **common)
        return replace(pairs, method=f"LOBPCG: {why}")
    overhead = getattr(A, "overhead", 0.0)
    width = min(_width(overhead, k), n) if block_size is None else block_size

    def after_step(spent: int, what: str) -> None:
        saved.keep(partial(lanczos.state_dict, copy=False))
        if callback is not None:
            callback(spent, what)

    lanczos = ThickRestartLanczos(
        A,
        k,
        callback=after_step,
        block_size=width,
        num_basis=num_basis,
        deflate=deflate,
        basis_device=basis_device,
        basis_dtype=basis_dtype,
        **common,
    )
    if (state := saved.kept()) is not None:
        lanczos.load_state_dict(state)
    columns = "single products" if width == 1 else f"blocks of {width}"
    shares = "as asked for" if block_size else f"as columns of a block share {'work' if overhead else 'nothing'}"
    pairs = lanczos.run(max_matvecs=max_matvecs, keep_basis=False)
    return replace(pairs, method=f"thick-restart Lanczos: {why}; {columns}, {shares}")


def _width(overhead: float, k: int) -> int:
    """Return the columns to multiply at a time, where a product costs as much as `overhead` columns beside its own."""
    expected = {b: (overhead / b + 1) * block_penalty(k, b) for b in _WIDTHS}
    best = min(_WIDTHS, key=lambda b: expected[b])
    return best if expected[best] <= _WORTH * expected[1] else 1


def block_penalty(k: int, width: int) -> float:
    """Return about how many times the products of single-vector Lanczos a block of `width` takes for k eigenpairs.

    Medians over twenty spectra: 1.6, 2.6, 4.3 for k = 1 and width 2, 4, 8; 1.2, 1.5, 2.0 for k = 10; 1.1, 1.2, 1.4 for
    k = 50.
    """
    return 1 + 0.55 * (width - 1) / k**0.55


def _dense(A: MatrixLike, k: int, which: Which, rtol: float, atol: float, method: str, saved: Checkpoint) -> EigenPairs:
    matrix = saved.piece(lambda: to_dense(A, columns_at_a_time=8)).to(
        torch.promote_types(working_dtype(A), torch.float64)
    )
    values, U = torch.linalg.eigh((matrix + matrix.T) / 2)
    norm, places = values.abs().max(), wanted(values, k, which).flip(0)
    values, U = values[places], U[:, places]
    dtype = working_dtype(A)
    residuals, is_noisy = with_noise(A, torch.linalg.vector_norm(matrix @ U - U * values, dim=0), norm)
    converged = (residuals <= (rtol * values.abs()).clamp_min(atol)) | (not is_noisy)
    return EigenPairs(
        eigenvalues=values.to(dtype),
        eigenvectors=U.to(dtype),
        residual_norms=residuals.to(dtype),
        converged=converged,
        num_matvecs=0 if isinstance(A, Tensor) else A.shape[0],
        status=Status.CONVERGED if bool(converged.all()) else Status.WITHIN_NOISE,
        rtol=rtol,
        miss_probability=0.0,
        method=method,
        product_noise=product_noise(A) or None,
    )
